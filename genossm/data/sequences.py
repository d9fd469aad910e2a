"""Batches of labelled sequences: tokenising, right padding, cropping and strands happen here, for every data set."""

from collections.abc import Mapping, Sequence

import lightning as L
import numpy as np
import numpy.typing as npt
import torch

from genossm.data.base import Batch, NumberedBatches, RunLoader
from genossm.data.examples import Array, Example, Target
from genossm.data.transforms import IGNORED
from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.tokenizer import CharTokenizer, Tokenizer

CROPS = ("error", "start", "center")
_BUCKET = 32
"""Batches whose rows are sorted by length together: what is padded shrinks, what is drawn stays random."""


class Encoded:
    """The sequences of a split as stored bytes, one after another, and their targets.

    Raises:
        ValueError: a letter is no nucleotide, or a sequence is longer than `longest` and `crop` is "error".
    """

    def __init__(self, rows: Sequence[Example], target: Target, longest: int | None = None, crop: str = "error"):
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}; got {crop!r}.")
        parts: list[Bytes] = []
        cuts: list[int] = []
        for number, row in enumerate(rows):
            if longest is not None and len(row.sequence) > longest and crop == "error":
                known = row.name or row.interval
                raise ValueError(
                    f"Row {number}{f' ({known})' if known else ''} has {len(row.sequence)} bp; the model takes at most"
                    f" {longest}. Take a model with a longer context (model.max_length), or crop with"
                    " loader.crop=center."
                )
            kept = min(len(row.sequence), longest or len(row.sequence))
            cut = (len(row.sequence) - kept) // 2 if crop == "center" else 0
            cut -= cut % target.bin
            try:
                parts.append(alphabet.from_text(row.sequence[cut : cut + kept]))
            except ValueError as error:
                raise ValueError(f"Row {number} ({row.name or row.interval}): {error}") from None
            cuts.append(cut)
        self.codes = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        self.lengths = np.array([len(part) for part in parts], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.target = target
        self.targets = [_cut_target(r.target, target, c, n) for r, c, n in zip(rows, cuts, self.lengths, strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> Bytes:
        """Return the stored bytes of a row."""
        start = self.starts[number]
        return self.codes[start : start + self.lengths[number]]


def _cut_target(value: Array, target: Target, start: int, length: int) -> Array:
    if not target.along:
        return value
    return value[start // target.bin : (start + length) // target.bin]


class SequenceBatches(NumberedBatches):
    """Batches of labelled sequences by number, padded on the right, each of rows of about the same length.

    Args:
        rows: the split.
        tokenizer: makes ids of stored bytes.
        batch_size: rows of this process in a batch.
        seed: what order and strands are drawn from; None keeps rows in order of length, once, for evaluation.
        reverse_complement: draw each row's strand (training only).
        mutate: share of the bases that another, drawn one takes the place of (training only).
        rank, world: this process among those that share each global batch.
    """

    def __init__(
        self,
        rows: Encoded,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int | None,
        reverse_complement: bool = False,
        rank: int = 0,
        world: int = 1,
        mutate: float = 0.0,
    ):
        self.rows, self.tokenizer, self.batch_size, self.mutate = rows, tokenizer, batch_size, mutate
        self.seed, self.reverse_complement, self.rank, self.world = seed, reverse_complement, rank, world
        self._pass: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    @property
    def per_pass(self) -> int:
        """Global batches of a pass: for training what does not fill one waits for the next pass."""
        size = self.batch_size * self.world
        return max(1, len(self.rows) // size) if self.seed is not None else -(-len(self.rows) // size)

    def __len__(self) -> int:
        return self.per_pass

    def numbers(self, index: int) -> npt.NDArray[np.int64]:
        """Return the rows of this process in batch `index` of the run."""
        this_pass, within = divmod(index, self.per_pass)
        if self._pass[0] != this_pass:
            self._pass = (this_pass, self._order(this_pass))
        size = self.batch_size * self.world
        rows = self._pass[1][within * size : (within + 1) * size]
        return rows[self.rank :: self.world] if len(rows) > self.rank else rows[:1]

    def _order(self, this_pass: int) -> npt.NDArray[np.int64]:
        lengths = self.rows.lengths
        if self.seed is None:
            return np.argsort(lengths, kind="stable")
        rng = np.random.default_rng([self.seed, this_pass])
        order = rng.permutation(len(lengths))
        size = self.batch_size * self.world
        if lengths.min() == lengths.max() or len(order) < size:
            return order
        order = order[: self.per_pass * size]
        span = _BUCKET * size
        chunks = [order[i : i + span] for i in range(0, len(order), span)]
        batches = np.concatenate([c[np.argsort(lengths[c], kind="stable")] for c in chunks]).reshape(-1, size)
        return batches[rng.permutation(len(batches))].reshape(-1)

    def __getitem__(self, index: int) -> Batch:
        numbers = self.numbers(index)
        flips = np.zeros(len(numbers), bool)
        if self.seed is not None and self.reverse_complement:
            flips = np.random.default_rng([self.seed, index, self.rank, 1]).random(len(numbers)) < 0.5
        ids: list[npt.NDArray[np.integer]] = []
        mutations = np.random.default_rng([self.seed or 0, index, self.rank, 2])
        for number, flip in zip(numbers, flips, strict=True):
            codes = self.rows.row(int(number))
            if self.seed is not None and self.mutate:
                codes = mutated(codes, self.mutate, mutations)
            ids.append(self.tokenizer.from_codes(alphabet.reverse_complement(codes) if flip else codes))
        lengths = np.array([len(row) for row in ids])
        longest = int(lengths.max())
        ids_BL = np.full((len(ids), longest), self.tokenizer.pad_id, np.uint8 if self._small else np.int32)
        for row, tokens in enumerate(ids):
            ids_BL[row, : len(tokens)] = tokens
        batch: Batch = {
            "ids_BL": torch.from_numpy(ids_BL),
            "targets": self._targets(numbers, flips, longest),
        }
        if int(lengths.min()) < longest:
            batch["lengths_B"] = torch.from_numpy(lengths)
        return batch

    @property
    def _small(self) -> bool:
        return self.tokenizer.vocab_size <= 256

    def _targets(self, numbers: Array, flips: Array, longest: int) -> torch.Tensor:
        target, values = self.rows.target, [self.rows.targets[n] for n in numbers]
        if not target.along:
            return torch.tensor(values, dtype=torch.int64 if target.chooses else torch.float32)
        values = [value[::-1] if flip else value for value, flip in zip(values, flips, strict=True)]
        if target.kind == "per_base":
            padded = np.full((len(values), longest), IGNORED, np.uint8)
        else:
            padded = np.full((len(values), -(-longest // target.bin), len(target.names)), np.nan, np.float32)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
        return torch.from_numpy(padded)


def mutated(codes: Bytes, share: float, rng: np.random.Generator) -> Bytes:
    """Return stored bytes in which each base is, with the chance `share`, one that is drawn; N stays."""
    drawn = rng.integers(alphabet.A, alphabet.T + 1, len(codes)).astype(np.uint8)
    exchanged = (rng.random(len(codes)) < share) & ((codes & np.uint8(0x7F)) != alphabet.N)
    return np.where(exchanged, drawn, codes)


class Sequences(L.LightningDataModule):
    """A data module over labelled sequences.

    Args:
        splits: examples of train, val and test.
        target: what they are labelled with.
        batch_size: rows a batch and process.
        batches: batches of the whole run.
        tokenizer: None is one token a base.
        longest: the model's context in bp; None where any length goes.
        crop: what happens to longer sequences: "error", or keep the "start" or "center".
        reverse_complement: draw each training row's strand.
        mutate: share of the bases of each training row that a drawn one takes the place of.
        eval_batch_size: None is `batch_size`.
        num_workers: processes that prepare batches.
        seed: what orders and strands are drawn from.

    Raises:
        ValueError: see `Encoded`.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Example]],
        target: Target,
        *,
        batch_size: int = 32,
        batches: int = 1,
        tokenizer: Tokenizer | None = None,
        longest: int | None = None,
        crop: str = "error",
        reverse_complement: bool = False,
        mutate: float = 0.0,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if not 0 <= mutate < 1:
            raise ValueError(f"loader.mutate must be in [0, 1); got {mutate}.")
        self.tokenizer = tokenizer or CharTokenizer()
        if target.along and self.tokenizer.bases_per_token != 1:
            raise ValueError(f"A {target.kind} target needs one token a base; this model's tokenizer joins several.")
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.eval_batch_size, self.num_workers = eval_batch_size or batch_size, num_workers
        self.reverse_complement, self.mutate = reverse_complement, mutate
        self.splits = {name: Encoded(rows, target, longest, crop) for name, rows in splits.items()}

    def of(self, split: str) -> SequenceBatches:
        """Return the batches of a split: of the whole run for train, once through for the others."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        train = split == "train"
        return SequenceBatches(
            self.splits[split],
            self.tokenizer,
            self.batch_size if train else self.eval_batch_size,
            self.seed if train else None,
            self.reverse_complement,
            rank,
            world,
            self.mutate if train else 0.0,
        )

    def train_dataloader(self) -> RunLoader:
        """Return the loader of the whole run."""
        return RunLoader(self.of("train"), self.batches, self.num_workers, self._pin())

    def val_dataloader(self) -> RunLoader:
        """Return the loader of the validation split."""
        return self._once("val")

    def test_dataloader(self) -> RunLoader:
        """Return the loader of the test split."""
        return self._once("test")

    def _once(self, split: str) -> RunLoader:
        batches = self.of(split)
        return RunLoader(batches, len(batches), pin_memory=self._pin())

    def _pin(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
