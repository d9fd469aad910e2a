"""What a change of sequence changes for a model: log-likelihood, embedding, a fine-tuned head's answer.

Used by `score` and `ism`. A site is a reference and its alleles; what they share is computed once: the reference, for
masked models the masked sequence, for causal recurrent ones the state before the change. Sites with the same reference
share its run.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.inference import Batches, Opened, is_recurrent, join_rows, select_rows
from genossm.models.base import length_mask
from genossm.models.classifier import Classifier

METHODS = ("llr", "l2", "cosine", "head")
_STATES = 64
"""Sites along references whose states wait for their alleles at a time."""
_STOPS = 64
"""Places in a reference at which its state may be kept: alleles start at the last one before their site."""
_PIECE = {"cpu": 1 << 13, "cuda": 1 << 20}
"""Tokens of a batch that are read at once, by kind of device: on a CPU few enough to stay near."""


@dataclass(frozen=True)
class Site:
    """Sequences to compare with the first.

    Attributes:
        sequences: stored bases, the reference first, then one an allele.
        prefix: bases at the start that all of them share.
        hidden: for each allele how many bases from `prefix` on masked models hide, in it and in the reference: those
            of the longer of the two; 0 where bases are exchanged one for one, and those that differ are hidden.
    """

    sequences: list[Bytes]
    prefix: int
    hidden: list[int]


class Effects:
    """Compares alleles with their reference.

    Args:
        ready: the model.
        methods: of `METHODS`: llr, the log-likelihood ratio in nats (causal models: of the whole sequence; masked ones:
            of the bases that differ, all of them hidden; for an insertion or deletion of as many bases from the site on
            as the longer allele has, in either sequence); l2 and cosine, distances of the mean embeddings; head, the
            differences of a fine-tuned head's answers.
        classifier: what `head` needs.
        batch_size: sequences of a batch at most.
        share: whether a recurrent model computes the state before the change once; False is the plain way.

    Raises:
        ValueError: a method is unknown, or the model can't give it.
    """

    def __init__(
        self,
        ready: Opened,
        methods: Sequence[str],
        classifier: Classifier | None = None,
        batch_size: int | None = None,
        share: bool = True,
    ):
        wrong = [method for method in methods if method not in METHODS]
        if wrong or not methods:
            raise ValueError(f"methods must be of {', '.join(METHODS)}; got {', '.join(wrong) or 'none'}.")
        if "head" in methods and classifier is None:
            raise ValueError("method head needs a fine-tuned model; this one has no head. Use llr, l2 or cosine.")
        if "llr" in methods and classifier is not None:
            raise ValueError(
                "method llr needs a language-model head, but this is a fine-tuned classifier, whose own was not trained"
                " further. Use head, l2 or cosine, or the pretrained model."
            )
        if classifier is not None and classifier.head.config.along:
            raise ValueError("This fine-tuned model answers each position; method head needs one answer a sequence.")
        if ready.tokenizer.bases_per_token != 1 and "llr" in methods:
            raise ValueError("method llr needs a model with one token a base. Use l2 or cosine.")
        self.ready, self.methods, self.classifier = ready, tuple(methods), classifier
        self.sizing = Batches(ready.device, batch_size)
        self.pools = any(method in methods for method in ("l2", "cosine"))
        self.likelihoods = "llr" in methods and ready.model.causal
        self.shares = share and classifier is None and is_recurrent(ready)
        self._base_ids: list[int] = ready.tokenizer.encode("ACGT").tolist()
        self._counted_V = torch.zeros(ready.model.config.padded_vocab_size, dtype=torch.bool, device=ready.device)
        self._counted_V[self._base_ids] = True

    @property
    def columns(self) -> list[str]:
        """Names of the values that each allele gets."""
        config = self.classifier.head.config if self.classifier is not None else None
        named = (config.names or tuple(map(str, range(config.n_outputs)))) if config is not None else ()
        heads = [f"delta_{name}" for name in named]
        return [name for method in self.methods for name in (heads if method == "head" else [method])]

    def __call__(self, sites: Sequence[Site]) -> list[Any]:
        """Return, for each site, the values of its alleles (alleles, columns) as float64; NaN where there is none."""
        found = [np.full((len(site.sequences) - 1, len(self.columns)), np.nan) for site in sites]
        if "llr" in self.methods and not self.ready.model.causal:
            self._masked(sites, found)
        if self.likelihoods or self.pools or self.classifier is not None:
            shared = [number for number, site in enumerate(sites) if self.shares and site.prefix > 0]
            others = [number for number in range(len(sites)) if number not in set(shared)]
            measured: dict[tuple[int, int], dict[str, Any]] = {}
            self._whole(sites, others, measured)
            self._from_prefix(sites, shared, measured)
            for number, site in enumerate(sites):
                for allele in range(1, len(site.sequences)):
                    self._compare(measured[number, 0], measured[number, allele], found[number][allele - 1])
        return found

    def substitutions(self, sequence: Bytes, positions: Sequence[int]) -> Any:
        """Return the effects of the three substitutions at each position, (positions, 3, columns).

        Plain models get one batch that is edited in place and mended again, so that memory is that of a batch.

        Args:
            sequence: stored bases without soft mask.
            positions: where to substitute; each must hold a base, not N.
        """
        masked = "llr" in self.methods and not self.ready.model.causal
        if masked or self.shares:
            # These share work between the alleles of a position, so positions come a few at a time.
            found: list[Any] = []
            for first in range(0, len(positions), 64):
                sites = [_substituted(sequence, at) for at in positions[first : first + 64]]
                found += self(sites)
            return np.array(found).reshape(len(positions), 3, len(self.columns))
        values = np.full((len(positions) * 3, len(self.columns)), np.nan)
        reference = _on_host(self._measure(self.ready.ids(sequence)[None].to(self.ready.device), None))
        ids_L = self.ready.ids(sequence)
        edits = [
            (at, ids_L.new_tensor(self._base_ids[base - alphabet.A]))
            for at in positions
            for base in range(alphabet.A, alphabet.N)
            if base != sequence[at]
        ]
        room = ids_L.new_empty((0, len(ids_L))).to(self.ready.device)

        def call(batch: list[int]) -> None:
            nonlocal room
            if len(room) < len(batch):
                room = ids_L.to(self.ready.device).repeat(len(batch), 1)
            rows = torch.arange(len(batch), device=room.device)
            places = torch.tensor([edits[row][0] for row in batch], device=room.device)
            room[rows, places] = torch.stack([edits[row][1] for row in batch]).to(room.device)
            measured = _on_host(self._measure(room[: len(batch)], None))
            room[rows, places] = ids_L.to(room.device)[places]
            for index, row in enumerate(batch):
                one = {name: value[index] for name, value in measured.items()}
                self._compare({name: value[0] for name, value in reference.items()}, one, values[row])

        self.sizing.run([len(ids_L)] * len(edits), call)
        return values.reshape(len(positions), 3, len(self.columns))

    def _compare(self, ref: dict[str, Any], alt: dict[str, Any], values: Any) -> None:
        """Fill one allele's values from what was measured on it and on its reference."""
        if "nats" in ref:
            values[self.columns.index("llr")] = alt["nats"] - ref["nats"]
        if "l2" in self.methods:
            values[self.columns.index("l2")] = np.linalg.norm(alt["mean"] - ref["mean"])
        if "cosine" in self.methods:
            scale = np.linalg.norm(alt["mean"]) * np.linalg.norm(ref["mean"])
            values[self.columns.index("cosine")] = 1 - alt["mean"] @ ref["mean"] / max(scale, 1e-30)
        if "head" in self.methods:
            first = next(index for index, name in enumerate(self.columns) if name.startswith("delta_"))
            values[first : first + len(ref["answer"])] = alt["answer"] - ref["answer"]

    def _whole(self, sites: Sequence[Site], chosen: Sequence[int], measured: dict[tuple[int, int], Any]) -> None:
        """Run every sequence of the chosen sites on its own; a reference that several of them have, once."""
        rows = [(number, allele) for number in chosen for allele in range(1, len(sites[number].sequences))]
        owners = list(_by_reference(sites, chosen).values())
        rows += [(numbers[0], 0) for numbers in owners]
        ids = [self.ready.ids(sites[number].sequences[allele]) for number, allele in rows]
        found: list[tuple[list[int], dict[str, Tensor]]] = []

        def call(batch: list[int]) -> None:
            found.append((batch, self._measure(*self.ready.stack([ids[row] for row in batch]))))

        self.sizing.run([len(row) for row in ids], call)
        # Only now, so that a GPU does not wait between two batches for the next to be prepared.
        for batch, values in found:
            host = _on_host(values)
            for index, row in enumerate(batch):
                measured[rows[row]] = {name: value[index] for name, value in host.items()}
        for numbers in owners:
            measured |= {(number, 0): measured[numbers[0], 0] for number in numbers}

    def _measure(self, ids_BL: Tensor, lengths_B: Tensor | None) -> dict[str, Tensor]:
        """Run rows and return what is compared of each, on the device: nats, mean embedding, the head's answer."""
        x_BLD = self.ready.model(ids_BL, lengths_B)
        values: dict[str, Tensor] = {}
        if lengths_B is None:
            lengths_B = torch.full(ids_BL.shape[:1], ids_BL.shape[1], device=ids_BL.device)
        real_BL = length_mask(lengths_B, ids_BL.shape[1])
        if self.likelihoods:
            values["nats"] = self._nats(x_BLD[:, :-1], ids_BL[:, 1:], real_BL[:, 1:]).sum(1)
        if self.pools:
            sums_BD = (x_BLD.float() * real_BL[..., None]).sum(1)
            values["mean"] = (sums_BD / lengths_B[:, None]).double()
        if self.classifier is not None and "head" in self.methods:
            values["answer"] = self.classifier.head(x_BLD, lengths_B).double().flatten(1)
        return values

    def _from_prefix(self, sites: Sequence[Site], chosen: Sequence[int], measured: dict[tuple[int, int], Any]) -> None:
        """Read each reference once, equally long ones side by side, and each allele from the state that it left."""
        groups: dict[int, list[list[int]]] = defaultdict(list)
        for numbers in _by_reference(sites, chosen).values():
            groups[len(sites[numbers[0]].sequences[0])].append(numbers)
        for length, rows in groups.items():

            def call(batch: list[int], rows: list[list[int]] = rows) -> None:
                self._along(sites, [rows[index] for index in batch], measured)

            # Read in pieces, so that more of them fit side by side.
            self.sizing.run([-(-length // 4)] * len(rows), call)

    def _along(self, sites: Sequence[Site], rows: Sequence[list[int]], measured: dict[tuple[int, int], Any]) -> None:
        """Read references side by side, and the alleles of their sites from the states on the way."""
        ids_BL, _ = self.ready.stack([self.ready.ids(sites[numbers[0]].sequences[0]) for numbers in rows])
        nats_BL = torch.zeros(ids_BL.shape, dtype=torch.float64, device=ids_BL.device)
        here, done = self._start(len(rows)), 0
        places = sorted((_cut(sites[number]), row, number) for row, numbers in enumerate(rows) for number in numbers)
        for first in range(0, len(places) + 1, _STATES):
            chunk = places[first : first + _STATES]
            passed: dict[tuple[int, int], _Passed] = {}
            # After the last site comes what is left of the references.
            ends = [(ids_BL.shape[1], -1, -1)] if len(chunk) < _STATES else []
            for cut, row, _ in [*chunk, *ends]:
                if cut > done:
                    nats_BL[:, done:cut], here = self._read(ids_BL[:, done:cut], here)
                    done = cut
                if row >= 0 and (row, cut) not in passed:
                    passed[row, cut] = here.row(row)
            self._alleles(sites, [(number, passed[row, cut]) for cut, row, number in chunk], measured)
        means_BD = (here.sum_BD / ids_BL.shape[1]).cpu().numpy()
        nats = nats_BL.cpu().numpy()
        for cut, row, number in places:
            values = {"nats": float(nats[row, cut:].sum())} if self.likelihoods else {}
            measured[number, 0] = values | ({"mean": means_BD[row]} if self.pools else {})

    def _alleles(
        self, sites: Sequence[Site], starts: Sequence[tuple[int, "_Passed"]], measured: dict[tuple[int, int], Any]
    ) -> None:
        """Run what follows the shared start in each allele of some sites, given what was there."""
        rows = [
            (number, allele, before) for number, before in starts for allele in range(1, len(sites[number].sequences))
        ]
        # A deletion at a contig's end may leave nothing to run: one padding token keeps the batch rectangular.
        rest = [self.ready.ids(sites[number].sequences[allele][_cut(sites[number]) :]) for number, allele, _ in rows]
        padded = [row if len(row) else row.new_full((1,), self.ready.tokenizer.pad_id) for row in rest]

        def call(batch: list[int]) -> None:
            ids_BS, _ = self.ready.stack([padded[row] for row in batch])
            counted_B = torch.tensor([len(rest[row]) for row in batch], device=ids_BS.device)
            real_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) < counted_B[:, None]
            nats_BS, after = self._read(ids_BS, _Passed.join([rows[row][2] for row in batch]), real_BS)
            nats_B = nats_BS.sum(1).tolist()
            starts_B = torch.tensor([_cut(sites[rows[row][0]]) for row in batch], device=ids_BS.device)
            means_BD = (after.sum_BD / (starts_B + counted_B)[:, None]).cpu().numpy()
            for index, row in enumerate(batch):
                values: dict[str, Any] = {"nats": nats_B[index]} if self.likelihoods else {}
                measured[rows[row][:2]] = values | ({"mean": means_BD[index]} if self.pools else {})

        self.sizing.run([len(row) for row in padded], call)

    def _start(self, rows: int) -> "_Passed":
        """Return what stands before the first base; it predicts nothing, so no site is compared there."""
        model, device = self.ready.model, self.ready.device
        zeros_B1D = torch.zeros(rows, 1, model.d_output, device=device)
        return _Passed(model.init_state(rows), zeros_B1D, zeros_B1D[:, 0].double())

    def _read(self, ids_BL: Tensor, before: "_Passed", real_BL: Tensor | None = None) -> tuple[Tensor, "_Passed"]:
        """Read on, piece by piece; returns the log-likelihood of each base in nats_BL and what there is after them.

        Args:
            ids_BL: what is read.
            before: where it starts.
            real_BL: the bases that count; None is all.
        """
        nats_BL = torch.zeros(ids_BL.shape, dtype=torch.float64, device=ids_BL.device)
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if real_BL is None else real_BL
        state, last_B1D, sum_BD = before
        piece = max(1, _PIECE.get(ids_BL.device.type, _PIECE["cpu"]) // len(ids_BL))
        for start in range(0, ids_BL.shape[1], piece):
            part = slice(start, start + piece)
            x_BPD, state = self.ready.model.extend(ids_BL[:, part], state)
            if self.likelihoods:
                shifted_BPD = torch.cat([last_B1D.to(x_BPD.dtype), x_BPD[:, :-1]], 1)
                nats_BL[:, part] = self._nats(shifted_BPD, ids_BL[:, part], real_BL[:, part])
            if self.pools:
                sum_BD = sum_BD + (x_BPD.double() * real_BL[:, part, None]).sum(1)
            last_B1D = x_BPD[:, -1:]
        return nats_BL, _Passed(state, last_B1D, sum_BD)

    def _nats(self, x_BLD: Tensor, targets_BL: Tensor, real_BL: Tensor) -> Tensor:
        """Return the log-likelihood of each target, 0 for N and padding, in float64."""
        targets_BL = targets_BL.long()
        logp_BLV = self.ready.model.logits(x_BLD).float().log_softmax(-1)
        picked_BL = logp_BLV.gather(-1, targets_BL[..., None])[..., 0]
        return torch.where(real_BL & self._counted_V[targets_BL], picked_BL.double(), 0.0)

    def _masked(self, sites: Sequence[Site], found: Sequence[Any]) -> None:
        """Hide the bases in which alleles differ from their reference and compare what the model expects there."""
        column = self.columns.index("llr")
        rows: dict[_Hidden, list[_Answer]] = defaultdict(list)
        for number, site in enumerate(sites):
            reference = site.sequences[0]
            for allele, sequence in enumerate(site.sequences[1:], start=1):
                if not site.hidden[allele - 1]:
                    changed = np.flatnonzero((sequence ^ reference) & 0x7F)
                    places = tuple(changed.tolist())
                    rows[_Hidden(number, 0, places)] += [_Answer(allele, 0, -1.0), _Answer(allele, allele, 1.0)]
                    continue
                # Equally many hidden bases on both sides, so that no allele is likelier only for being shorter.
                end = min(site.prefix + site.hidden[allele - 1], len(reference), len(sequence))
                places = tuple(range(site.prefix, end))
                if places:
                    rows[_Hidden(number, 0, places)].append(_Answer(allele, 0, -1.0))
                    rows[_Hidden(number, allele, places)].append(_Answer(allele, allele, 1.0))
        keys = list(rows)

        def call(batch: list[int]) -> None:
            chosen = [keys[row] for row in batch]
            ids: list[Tensor] = []
            for key in chosen:
                ids.append(self.ready.ids(sites[key.site].sequences[key.shown]).clone())
                ids[-1][list(key.places)] = self.ready.tokenizer.mask_id
            x_BLD = self.ready.model(*self.ready.stack(ids))
            row_K = torch.tensor([index for index, key in enumerate(chosen) for _ in key.places])
            place_K = torch.tensor([place for key in chosen for place in key.places])
            x_KD = x_BLD[row_K.to(x_BLD.device), place_K.to(x_BLD.device)]
            # One copy to the host a batch.
            logp_KV = self.ready.model.logits(x_KD).float().log_softmax(-1).double().cpu()
            for key, logp_PV in zip(chosen, logp_KV.split([len(key.places) for key in chosen]), strict=True):
                for answer in rows[key]:
                    true_P = self.ready.ids(sites[key.site].sequences[answer.sequence])[list(key.places)].long()
                    values = found[key.site][answer.allele - 1]
                    nats = float(logp_PV.gather(1, true_P[:, None]).sum())
                    values[column] = np.nan_to_num(values[column]) + answer.sign * nats

        self.sizing.run([len(sites[key.site].sequences[key.shown]) for key in keys], call)


def _on_host(values: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arrays of tensors, once the device has computed them."""
    return {name: value.cpu().numpy() for name, value in values.items()}


def _cut(site: Site) -> int:
    """Return where the alleles of a site start: not at the first base, which nothing predicts."""
    apart = max(1, len(site.sequences[0]) // _STOPS)
    return max(1, site.prefix // apart * apart)


class _Passed(NamedTuple):
    """What was read left behind: the state, the last hidden vector, the sum of all of them."""

    state: Any
    last_B1D: Tensor
    sum_BD: Tensor

    def row(self, row: int) -> "_Passed":
        """Return one row of it."""
        rows_B = torch.tensor([row], device=self.last_B1D.device)
        return _Passed(select_rows(self.state, rows_B), self.last_B1D[row : row + 1], self.sum_BD[row : row + 1])

    @staticmethod
    def join(several: Sequence["_Passed"]) -> "_Passed":
        """Return them as rows of one; a state's size does not tell how much was read."""
        states, lasts, sums = zip(*several, strict=True)
        return _Passed(join_rows(states), torch.cat(lasts), torch.cat(sums))


class _Hidden(NamedTuple):
    """A row of a masked model: sequence `shown` of a site with these places hidden."""

    site: int
    shown: int
    places: tuple[int, ...]


class _Answer(NamedTuple):
    """What a row is asked: how likely a sequence's bases are at the hidden places; it counts for an allele's ratio."""

    allele: int
    sequence: int
    sign: float


def _by_reference(sites: Sequence[Site], chosen: Sequence[int]) -> dict[bytes, list[int]]:
    """Return the chosen sites by the bases of their reference."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number in chosen:
        groups[sites[number].sequences[0].tobytes()].append(number)
    return groups


def _substituted(sequence: Bytes, at: int) -> Site:
    """Return a sequence and its three substitutions at a position, in the order of the alphabet."""
    made = [sequence]
    for base in range(alphabet.A, alphabet.N):
        if base != sequence[at]:
            changed = sequence.copy()
            changed[at] = base
            made.append(changed)
    return Site(made, at, [0] * 3)


def open_classifier(model: Any) -> Classifier | None:
    """Return the fine-tuned model where a folder, or an object, is one; None for a plain backbone."""
    import json

    from genossm import checkpoint

    if isinstance(model, Classifier):
        return model
    if isinstance(model, str | Path):
        config = Path(model) / checkpoint.CONFIG
        if config.is_file() and checkpoint.has_head(json.loads(config.read_text())):
            return checkpoint.load_classifier(model)
    return None
