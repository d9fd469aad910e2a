"""The longest input, a power of two, that each backbone trains on: batch 1, checkpointed, one whole step of AdamW."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from genossm.benchmarks.base import Comparison, Run
from genossm.benchmarks.sweep import Point, place
from genossm.models.base import config_from_dict
from genossm.optim import Optim
from genossm.tasks.causal_lm import CausalLM

BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    "HyenaDNA d256 x 8": ({"model_type": "hyenadna", "d_model": 256, "n_layer": 8}, 1 << 21),
    "Caduceus-Ph d256 x 16": ({"model_type": "caduceus", "d_model": 256, "n_layer": 16}, 1 << 21),
    "Caduceus-PS d256 x 16": ({"model_type": "caduceus", "d_model": 256, "n_layer": 16, "rcps": True}, 1 << 20),
    "Mamba d256 x 8": ({"model_type": "mamba", "d_model": 256, "n_layer": 8}, 1 << 21),
    "Mamba-2 d256 x 8": ({"model_type": "mamba2", "d_model": 256, "n_layer": 8}, 1 << 20),
    "StripedHyena d256 x 8": (
        {"model_type": "striped_hyena", "d_model": 256, "n_layer": 8, "n_head": 4, "vocab_size": 16},
        1 << 19,
    ),
    "Transformer d256 x 8": ({"model_type": "transformer", "d_model": 256, "n_layer": 8, "n_head": 4}, 1 << 19),
}
"""Shapes, and the length that a GPU tries first: what 80 GB are known to hold. A CPU begins at `_SHORT`."""
_SHORT = 1 << 10
_LONG = 1 << 26
_SHORTEST = {"cuda": 1 << 14, "cpu": 1 << 8}
"""Kernels are compiled by a step of this length, or of the one asked for, which is not timed."""
_QUADRATIC = 1 << 16
"""Where the time of attention begins to grow with the square of the length."""
_ATTENTION = ("Transformer", "StripedHyena")


def comparisons(device: torch.device) -> list[Comparison]:
    """Return of each backbone the first length and its doubles, then its halves, where the first that runs ends it."""
    points: list[Comparison] = []
    for name, (shape, first) in BACKBONES.items():
        first = first if device.type == "cuda" else _SHORT
        upwards = [first << n for n in range(27) if first << n <= _LONG]
        downwards = [first >> n for n in range(1, 27) if first >> n >= _SHORT]
        points += [_point(name, shape, length, device) for length in upwards + downwards]
    return points


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the longest length of each backbone, and what stands above it, in lines."""
    ran: dict[str, Mapping[str, Any]] = {}
    ended: dict[str, dict[int, str]] = {}
    for row in rows:
        series, length = place(row)
        if math.isnan(row["seconds"]):
            ended.setdefault(series, {})[length] = row["variant"]
        elif series not in ran or length > place(ran[series])[1]:
            ran[series] = row
    lines: list[str] = []
    for series in dict.fromkeys([*ran, *ended]):
        row, above = ran.get(series), ended.get(series, {})
        least = 0 if row is None else place(row)[1]
        told = "none" if row is None else f"{least:,} tokens in {row['seconds']:.3g} s"
        if row is not None and row["peak_mib"] is not None:
            told += f" and {row['peak_mib'] / 1024:.3g} GiB"
        bound = min((length for length in above if length > least), default=None)
        lines.append(f"{series}: {told}" + ("" if bound is None else f"; {bound:,}: {above[bound]}"))
    return lines


def _point(name: str, shape: Mapping[str, Any], length: int, device: torch.device) -> Point:
    return Point(
        name=f"{name} {length}",
        series=name,
        length=length,
        build=partial(_build, shape, length, device),
        tokens=length,
        once=("training step",),
        power=2.0 if name.startswith(_ATTENTION) and length > _QUADRATIC else 1.0,
        largest=True,
    )


def _build(shape: Mapping[str, Any], length: int, device: torch.device) -> Mapping[str, Run]:
    torch.manual_seed(0)
    own = {"max_length": length} if shape["model_type"] == "hyenadna" else {}
    model = config_from_dict({**shape, **own}).build().to(device).train()
    model.gradient_checkpointing = True
    task = CausalLM(model, Optim(), steps=1)
    optimizer = task.optim.build(task)

    def step(tokens: int) -> None:
        ids_BL = torch.randint(7, 11, (1, tokens), dtype=torch.uint8, device=device)
        batch: Any = {"ids_BL": ids_BL, "targets": ids_BL}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task.losses(batch, torch.ones_like(ids_BL, dtype=torch.bool))[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(min(length, _SHORTEST[device.type]))
    return {"training step": partial(step, length)}
