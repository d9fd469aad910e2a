"""Time and memory of the backbones over the length of the sequence, at matched numbers of parameters."""

import contextlib
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genossm.benchmarks.base import Comparison, Run
from genossm.benchmarks.mamba import build_transformers
from genossm.benchmarks.sweep import Point, place
from genossm.models.base import config_from_dict
from genossm.models.mamba import MambaLM
from genossm.ops.backend import installed, use_backend
from genossm.recording import cause, record

_log = logging.getLogger(__name__)
LENGTHS = {
    "cuda": (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22),
    "cpu": (1 << 10, 1 << 12, 1 << 14),
}
"""Lengths by kind of device."""
_LONGEST_THEIRS = {"training": 1 << 10, "inference": 1 << 12}
"""Where transformers' Mamba stops on a CPU: its training takes a time quadratic in the length there."""
_ATTENTION = ("transformer", "striped_hyena")
_QUADRATIC = 1 << 16
"""Where their time begins to grow with the square of the length."""
_LONGEST_ATTENTION = 1 << 20
"""Where these stop: their next lengths would take half a minute and more a step."""
_LONGEST_RECORDED = 1 << 16
"""Up to here asking for kernels may take longer than running them, so that a step is also recorded as a CUDA graph."""
SHAPES: dict[str, dict[str, Any]] = {
    "hyenadna": {"model_type": "hyenadna", "d_model": 128, "n_layer": 2},
    "caduceus": {"model_type": "caduceus", "d_model": 128, "n_layer": 4},
    "mamba": {"model_type": "mamba", "d_model": 128, "n_layer": 4},
    "mamba2": {"model_type": "mamba2", "d_model": 128, "n_layer": 4},
    "striped_hyena": {"model_type": "striped_hyena", "d_model": 128, "n_layer": 2},
    "transformer, flash": {"model_type": "transformer", "d_model": 128, "n_layer": 2, "n_head": 2},
    "transformer, cuDNN": {"model_type": "transformer", "d_model": 128, "n_layer": 2, "n_head": 2},
}
"""About 0.4 M parameters each."""


def comparisons(device: torch.device) -> list[Comparison]:
    """Return a point a backbone, length and kind of work, the shortest first; batch 1, checkpointed where it trains."""
    return [
        Point(
            name=f"{name} {work} {length}",
            series=f"{name} {work}",
            length=length,
            build=partial(_build, name, work, length, device),
            tokens=length,
            memory=device.type == "cuda",
            power=2.0 if name.startswith(_ATTENTION) and length > _QUADRATIC else 1.0,
        )
        for length in LENGTHS[device.type]
        for name in SHAPES
        if device.type == "cuda" or "cuDNN" not in name
        if length <= _LONGEST_ATTENTION or not name.startswith(_ATTENTION)
        for work in ("training", "inference")
    ]


def _build(name: str, work: str, length: int, device: torch.device) -> Mapping[str, Run]:
    torch.manual_seed(0)
    shape = SHAPES[name] | ({"max_length": length} if SHAPES[name]["model_type"] == "hyenadna" else {})
    model = config_from_dict(shape).build().to(device).train(work == "training")
    model.gradient_checkpointing = True
    ids_BL = torch.randint(7, 11, (1, length), device=device)
    attention = partial(_attention, name, device)

    def infer(cached: bool = True) -> None:
        with attention(), torch.no_grad(), _rounded(device, cached):
            model(ids_BL)

    def train(cached: bool = True) -> None:
        with attention():
            with _rounded(device, cached):
                loss = model(ids_BL).float().square().mean()
            loss.backward()
        model.zero_grad(set_to_none=True)

    run: Callable[..., None] = train if work == "training" else infer
    variants: dict[str, Run] = {} if device.type == "cuda" else {"plain torch": _plainly(run)}
    variants[f"{model.num_parameters():,} parameters"] = run
    if device.type == "cuda" and length <= _LONGEST_RECORDED:
        variants |= _recorded(name, partial(run, cached=False))
    if isinstance(model, MambaLM) and _reach_transformers(work, length, device):
        variants["transformers"] = _theirs(model, work, ids_BL)
    return variants


def _rounded(device: torch.device, cached: bool = True) -> torch.autocast:
    """Return bfloat16's autocast on a GPU; a CPU, whose kernels are float32's, computes in that."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=cached)


def _plainly(run: Run) -> Run:
    def plain() -> object:
        with use_backend("torch"):
            return run()

    return plain


def _reach_transformers(work: str, length: int, device: torch.device) -> bool:
    return device.type == "cpu" and length <= _LONGEST_THEIRS[work] and installed("transformers")


def _theirs(model: MambaLM, work: str, ids_BL: Tensor) -> Run:
    """Return the same work by transformers' Mamba of the same shape."""
    other = build_transformers(model).train(work == "training")

    def run() -> None:
        with torch.set_grad_enabled(work == "training"):
            x_BLD = other.backbone(ids_BL, use_cache=False).last_hidden_state
        if work == "training":
            x_BLD.float().square().mean().backward()
            other.zero_grad(set_to_none=True)

    return run


def _recorded(name: str, run: Run) -> dict[str, Run]:
    """Return a run that was recorded, so that its kernels start without Python, or nothing where it can't be."""
    try:
        replay, _ = record(run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _log.warning("%s can't be recorded as a CUDA graph: %s", name, cause(error))
        return {}
    return {"as a CUDA graph": replay}


def _attention(name: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # attend() puts cuDNN's kernel first, so only the other needs to be asked for.
    return (
        sdpa_kernel([SDPBackend.FLASH_ATTENTION])
        if "flash" in name and device.type == "cuda"
        else contextlib.nullcontext()
    )


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the seconds of each backbone and kind of work by length, those of its fastest variant that ran."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        series, length = place(row)
        if not math.isnan(row["seconds"]):
            points = times.setdefault(series, {})
            points[length] = min(row["seconds"], points.get(length, math.inf))
    return times


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return, for each backbone and kind of work, the power of the length that its time grows with at the long end.

    The median of the slopes of log time over log length between any two lengths from 65,536 on, or between the two
    longest where those are too short (Theil 1950): a single run that paid for something once does not move it.
    """
    powers: dict[str, float] = {}
    for series, points in fastest(rows).items():
        if len(points) > 1:
            known = sorted(points.items())
            long = [point for point in known if point[0] >= _QUADRATIC]
            pairs = itertools.combinations(long if len(long) > 1 else known[-2:], 2)
            powers[series] = statistics.median(math.log(t / s) / math.log(m / n) for (n, s), (m, t) in pairs)
    return powers


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the rows come to, in lines."""
    return [f"{series}: time grows with length^{power:.2f}" for series, power in exponents(rows).items()]
