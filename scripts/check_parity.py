"""Compare our numbers with those that official code gave for the same weights and inputs.

    python scripts/check_parity.py FOLDER...

A folder holds config.json, weights and io.npz (inputs and official outputs), or is full of such folders. One row a
case and quantity; quantities in io.npz that nothing here knows are listed as not checked. Exit code 1 on any failure.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genossm import published, source
from genossm.layouts.base import Layout
from genossm.layouts.hyenadna import POOLINGS
from genossm.models.base import Backbone
from genossm.nn.attention import Attention
from genossm.nn.head import HEAD_POOLINGS, SequenceHead, pool
from genossm.nn.hyena import HyenaOperator
from genossm.ops.modal_conv import modal_filter

TOLERANCE = {"esm": (2e-5, 1e-5), "": (2e-4, 1e-4)}
"""(absolute, relative) tolerance of values by layout."""
LOSS, GRADIENT = (1e-4, 0.0), (1e-12, 1e-3)


@dataclass(frozen=True)
class Row:
    """One compared quantity."""

    case: str
    quantity: str
    difference: float | None
    """Largest absolute difference; None where it was not checked."""
    tolerance: str
    passed: bool


class Case:
    """One folder: the model, the official numbers, and ours as they are computed."""

    def __init__(self, folder: Path):
        self.name = folder.name
        meta = folder / "meta.json"
        self.meta: dict[str, Any] = json.loads(meta.read_text()) if meta.is_file() else {}
        # What the official classes take beside their config.
        told = dict(re.findall(r"\b(mode|l_output)=(\w+)", str(self.meta.get("head", ""))))
        pooling = self.meta.get("pooling_strategy") or POOLINGS.get(told.get("mode", ""))
        imported = published.read(source.find(folder), pooling=pooling)
        if imported.classifier is not None and told.get("l_output", "0").isdigit() and pooling != "none":
            head = imported.classifier.head
            head.config = dataclasses.replace(head.config, positions=int(told.get("l_output", "0")))
        self.layout: Layout = published.layouts()[imported.origin.layout]
        self.config = imported.origin.config
        self.backbone: Backbone = imported.backbone
        self.classifier = imported.classifier
        with np.load(folder / "io.npz", allow_pickle=False) as io:
            self.io = {name: io[name] for name in io.files}
        self.checked: set[str] = set()
        self.rows: list[Row] = []

    def tensor(self, name: str) -> Tensor:
        self.checked.add(name)
        return torch.from_numpy(self.io[name])

    def compare(
        self,
        name: str,
        got: Tensor,
        tolerance: tuple[float, float] | None = None,
        mask: Tensor | None = None,
        label: str | None = None,
        skip: int = 0,
    ) -> None:
        """Add the row of a quantity.

        `mask` says which positions count, `label` what the row is called, and `skip` (0 or 1) how many of the last
        axis' first entries of the official number have no counterpart.
        """
        absolute, relative = tolerance or TOLERANCE.get(self.layout.name, TOLERANCE[""])
        assert skip in (0, 1)
        truth, got = self.tensor(name).double(), got.detach().double()
        truth = truth[..., 1:] if skip else truth
        label = (name if mask is None else f"{name} (real positions)") if label is None else label
        if truth.shape != got.shape:
            self.rows.append(Row(self.name, f"{label}: shape {tuple(got.shape)}", float("inf"), "same shape", False))
            return
        if mask is not None:
            truth, got = truth[mask], got[mask]
        difference = (truth - got).abs()
        passed = bool((difference <= absolute + relative * truth.abs()).all())
        shown = f"{absolute:g} + {relative:g} |x|"
        self.rows.append(Row(self.name, label, float(difference.max()) if difference.numel() else 0.0, shown, passed))

    def lengths(self) -> Tensor | None:
        if "attention_mask" not in self.io:
            return None
        return self.tensor("attention_mask").sum(1)

    def run(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return what the official model calls logits."""
        if self.classifier is not None:
            return self.classifier(ids, lengths)
        return self.backbone.logits(self.backbone(ids, lengths))


def check(folder: Path) -> list[Row]:
    """Return the rows of one case."""
    case = Case(folder)
    steps: tuple[Callable[[Case], None], ...] = (
        *(check_outputs, check_hidden_states, check_other_inputs, check_filters, check_masked, check_decoding),
        *(check_head_modes, check_loss),
    )
    for step in steps:
        step(case)
    for name in sorted(set(case.io) - case.checked):
        case.rows.append(Row(case.name, name, None, "", True))
    return case.rows


def check_outputs(case: Case) -> None:
    """Compare logits and hidden states of the main input."""
    ids, lengths = case.tensor("input_ids"), case.lengths()
    with torch.no_grad():
        if "logits" in case.io:
            case.compare("logits", case.run(ids, lengths))
        if "last_hidden_state" in case.io:
            plain = ids[..., 0] if ids.ndim == 3 else ids
            case.compare("last_hidden_state", case.backbone(plain, lengths))
        if "logits_from_inputs_embeds" in case.io and case.classifier is not None:
            # Without ids the official classifier can't find the padding: it answers the last position.
            x = pool(case.backbone(ids), "last")
            case.compare("logits_from_inputs_embeds", case.classifier.head.answer(x))
        if "rc/equivariance_maxdiff" in case.io and "logits" in case.io and "rc/input_ids" in case.io:
            # How far the official model is from equivariant; ours may be as far, and the tolerance of logits.
            complement = case.backbone.complement_V
            turned = case.run(torch.from_numpy(case.io["rc/input_ids"])).flip(1)[..., complement]
            allowed = (float(case.tensor("rc/equivariance_maxdiff")) + 2e-4, 1e-4)
            case.compare("logits", turned, allowed, label="rc/equivariance_maxdiff")


def check_hidden_states(case: Case) -> None:
    """Compare the residual stream; families list it before, between or after the blocks."""
    names = sorted((n for n in case.io if n.startswith("hidden_states/")), key=lambda n: int(n.rpartition("/")[2]))
    if not names and "pre_norm_hidden_state" not in case.io:
        return
    ids, lengths = torch.from_numpy(case.io["input_ids"]), case.lengths()
    embed_options = () if case.layout.name != "esm" else (lengths,)
    with torch.no_grad():
        stream = [case.backbone.embed(ids, *embed_options)]
        x = case.backbone.run_layers(stream[0], lengths, lambda _, x: stream.append(x))
        final = case.backbone.norm_f(x)
    if "pre_norm_hidden_state" in case.io:
        case.compare("pre_norm_hidden_state", x)
    for name in names:
        case.compare(name, _listed(case, int(name.rpartition("/")[2]), stream, final))


def _listed(case: Case, index: int, stream: list[Tensor], final: Tensor) -> Tensor:
    """Return what the official code lists as hidden state `index`; `stream` has each block's input and the last sum."""
    last = len(stream) - 1
    family = case.layout.name
    if family in ("mamba-hf", "mamba2-hf"):
        # After each block, and the normed state in the end.
        return final if index >= last else stream[index + 1]
    if family.startswith("hyenadna"):
        # Before each block, after the last one, normed.
        return final if index > last else stream[index]
    if index >= last:
        return final
    if not family.startswith("caduceus") or index == 0:
        return stream[index]
    # The official blocks hand on what the mixer gave; the sum is carried beside it.
    before = stream[index - 1]
    if case.backbone.config.rcps and case.backbone.config.fused_add_norm:
        before = torch.cat(before.chunk(2, dim=-1)[::-1], dim=-1)
    return stream[index] - before


def check_other_inputs(case: Case) -> None:
    """Compare other lengths, the reverse complement, inputs without their mask, and conjoining in train mode."""
    prefixes = {n.rpartition("/")[0] for n in case.io if re.fullmatch(r"(extra\d+|rc|train)/input_ids", n)}
    with torch.no_grad():
        for prefix in sorted(prefixes):
            ids = case.tensor(f"{prefix}/input_ids")
            if f"{prefix}/logits" in case.io:
                case.compare(f"{prefix}/logits", case.run(ids))
            if f"{prefix}/last_hidden_state" in case.io:
                case.compare(f"{prefix}/last_hidden_state", case.backbone(ids))
        if "nomask/logits" in case.io:
            case.compare("nomask/logits", case.run(torch.from_numpy(case.io["input_ids"])))


def check_filters(case: Case) -> None:
    """Compare the taps of long convolutions."""
    for name in [n for n in case.io if n.startswith("filter/")]:
        mixer = case.backbone.layers[int(re.sub(r"\D", "", name))].mixer
        truth = case.io[name]
        with torch.no_grad():
            if isinstance(mixer, HyenaOperator):
                case.compare(name, mixer.filter_fn(truth.shape[1]).T[None])
            else:
                case.compare(name, modal_filter(*mixer.filters(), truth.shape[2])[None])


def check_masked(case: Case) -> None:
    """Compare inputs with padding, wherever the official code lets it stand."""
    if "masked/logits" not in case.io:
        return
    ids = torch.from_numpy(case.io["input_ids"])
    if "masked/attention_mask" in case.io:
        mask = case.tensor("masked/attention_mask").bool()
        with torch.no_grad():
            got = torch.zeros(case.io["masked/logits"].shape)
            for row, real in enumerate(mask):
                got[row, real] = case.run(ids[row : row + 1, real])[0]
        case.compare("masked/logits", got, mask=mask)
        return
    mask = case.tensor("masked/padding_mask")
    with torch.no_grad():
        x = case.backbone.embed(ids) * mask[..., None]
        for layer in case.backbone.layers:
            # The official attention sees padded keys, which the mask has only made zeros.
            seen = None if isinstance(layer.mixer, Attention) else mask.bool()
            x = layer(x, seen) * mask[..., None]
        case.compare("masked/logits", case.backbone.logits(case.backbone.norm_f(x)))


def check_decoding(case: Case) -> None:
    """Compare prefill and single steps, and the states after each."""
    if "decode/logits" not in case.io and "decode/prefill_len" not in case.io:
        return
    ids, start = torch.from_numpy(case.io["input_ids"]), int(case.tensor("decode/prefill_len"))
    with torch.no_grad():
        x, state = case.backbone.extend(ids[:, :start], case.backbone.init_state(ids.shape[0]))
        _compare_states(case, "decode/after_prefill", state)
        pieces = [case.backbone.logits(x)]
        if "decode/logits" not in case.io:
            return
        for t in range(start, case.io["decode/logits"].shape[1]):
            x, state = case.backbone.step(ids[:, t], state)
            pieces.append(case.backbone.logits(x)[:, None])
        case.compare("decode/logits", torch.cat(pieces, 1))
        _compare_states(case, "decode/final", state)


def _compare_states(case: Case, prefix: str, state: dict[str, Any]) -> None:
    for name in [n for n in case.io if n.startswith(f"{prefix}/")]:
        kind, index = name.split("/")[-2:]
        layer = state["layers"][int(index)]
        if kind == "iir_state":
            case.compare(name, torch.view_as_real(layer["modes_BDM"]))
        elif kind == "ssm_state":
            case.compare(name, layer["ssm_BEN"] if "ssm_BEN" in layer else layer["ssm_BHPN"])
        elif kind in ("conv_state", "fir_state"):
            # The published state of Mamba also holds the oldest input, which the next step no longer meets.
            got = layer["conv_BEW1"]
            oldest = case.io[name].shape[-1] - got.shape[-1]
            case.compare(name, got, label=f"{name} (newest {got.shape[-1]})" if oldest else None, skip=oldest)


def check_head_modes(case: Case) -> None:
    """Compare the other ways to pool that the official head has."""
    if case.classifier is None:
        return
    ids, head = torch.from_numpy(case.io["input_ids"]), case.classifier.head
    for name in [n for n in case.io if re.fullmatch(r"(logits|head)/\w+", n)]:
        mode = name.partition("/")[2]
        with torch.no_grad():
            pooling = POOLINGS.get(mode, mode)
            if pooling in HEAD_POOLINGS and pooling != "attention":
                rows = [case.backbone(x) for x in (ids.unbind(-1) if ids.ndim == 3 else [ids])]
                shape = dataclasses.replace(head.config, pooling=pooling, pad_id=None, positions=0)
                other = SequenceHead(case.backbone.d_output, shape).eval()
                other.dense, other.out = head.dense, head.out
                case.compare(name, torch.stack([other(x) for x in rows]).mean(0))


def check_loss(case: Case) -> None:
    """Compare the loss and the norms of its gradients by parameter."""
    if "labels" not in case.io or "loss" not in case.io:
        return
    model = case.backbone if case.classifier is None else case.classifier
    model.requires_grad_(True).zero_grad()
    labels = case.tensor("labels")
    logits = case.run(torch.from_numpy(case.io["input_ids"]), case.lengths())
    loss = _loss(case, logits, labels)
    case.compare("loss", loss, LOSS)
    if "loss_weighted" in case.io:
        case.compare("loss_weighted", _weighted_loss(case, logits.detach(), labels), LOSS)
    loss.backward()
    gradients = {name: p.grad for name, p in case.backbone.named_parameters(remove_duplicate=False)}
    if case.classifier is not None:
        gradients |= {f"head.{name}": p.grad for name, p in case.classifier.head.named_parameters()}
    for name in [n for n in case.io if n.startswith("grad_norm/")]:
        _, ours = case.layout.ours(name.removeprefix("grad_norm/"))
        ours = None if ours is None else ours.removesuffix("?")
        if ours is not None and ours not in gradients:
            ours = case.layout.stand_in(ours)
        gradient = None if ours is None else gradients.get(ours)
        if gradient is None:
            case.checked.add(name)
            case.rows.append(Row(case.name, f"{name}: nothing of ours has this gradient", float("inf"), "", False))
        else:
            case.compare(name, gradient.norm(), GRADIENT)


def _ignored(case: Case) -> int:
    if case.layout.name.startswith("caduceus"):
        return int(case.meta.get("ignore_index", case.config.get("pad_token_id") or 4))
    return -100


def _loss(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    if case.classifier is not None and labels.ndim < 3 and logits.ndim == 2:
        kind = case.config.get("problem_type") or case.meta.get("problem_type") or ""
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if kind == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.flatten())
    shifted = case.backbone.causal and "no shift" not in str(case.meta)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_ignored(case))


def _weighted_loss(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    weights = case.tensor("loss_weights").clone().flatten()
    weights[labels.flatten() == _ignored(case)] = 0
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_ignored(case), reduction="none")
    return (nats * weights / weights.sum()).sum()


def cases(folders: list[Path]) -> Iterator[Path]:
    """Yield the folders that hold io.npz: those given, and those inside them."""
    for folder in folders:
        if (folder / "io.npz").is_file():
            yield folder
        else:
            yield from sorted(path.parent for path in folder.glob("*/io.npz"))


def main(arguments: list[str]) -> int:
    """Print the table and return the exit code."""
    found = list(cases([Path(argument) for argument in arguments]))
    if not found:
        print("usage: python scripts/check_parity.py FOLDER...   (folders with io.npz, or folders of such)")
        return 2
    failed = 0
    for folder in found:
        try:
            rows = check(folder)
        except (ValueError, KeyError, FileNotFoundError) as error:
            rows = [Row(folder.name, f"not opened: {error}", float("inf"), "", False)]
        for row in rows:
            verdict = "not checked" if row.difference is None else "pass" if row.passed else "FAIL"
            shown = "" if row.difference is None else f"{row.difference:.3g}"
            print(f"{row.case:34} {row.quantity:70} {shown:>10}  {row.tolerance:20} {verdict}")
            failed += not row.passed
    print(f"{len(found)} cases, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
