"""Which implementation of an op runs, and why: the one place that looks for optional packages.

Names of backends: `reference` (the plain truth), `torch` (plain but chunked; runs everywhere), `numba` (CPU kernels),
`triton` (CUDA kernels), `mamba_ssm` (its CUDA package, if installed and asked for).
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

NAMES = ("reference", "torch", "numba", "triton", "mamba_ssm")
_forced: ContextVar[str | None] = ContextVar("genossm_backend", default=None)
_watched: ContextVar["dict[str, Choice] | None"] = ContextVar("genossm_watched", default=None)


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, as `genossm doctor` prints it."""

    name: str
    reason: str
    slower: bool = False
    """Whether the device has a faster one that can't run here."""


@functools.cache
def installed(package: str) -> bool:
    """Tell whether an optional package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def triton_version() -> str:
    """Return the installed Triton's version. It comes under several packages' names, so that it is asked itself."""
    return importlib.import_module("triton").__version__


@functools.cache
def _older(version: str, least: tuple[int, int]) -> bool:
    return tuple(map(int, version.split(".")[:2])) < least


def triton_interpreted() -> bool:
    """Tell whether Triton runs through its interpreter (`TRITON_INTERPRET=1`), so that it takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs(name: str, device: torch.device) -> str | None:
    """Return None where backend `name` can run on a device, else the reason why it can't."""
    if name in ("reference", "torch"):
        return None
    if name == "numba":
        if device.type != "cpu":
            return f"numba runs on the CPU; the tensors are on {device.type}"
        return None if installed("numba") else "numba is not installed"
    if name == "triton":
        if not installed("triton"):
            return "triton is not installed"
        if device.type == "cpu" and triton_interpreted():
            return None
        if device.type == "cuda":
            # Kernels collect what they load in tuples, which older compilers don't know.
            old = _older(triton_version(), (3, 3))
            return f"it takes triton 3.3 or newer (with torch 2.7); this is {triton_version()}" if old else None
        return f"triton runs on CUDA; the tensors are on {device.type}"
    if name == "mamba_ssm":
        if not installed("mamba_ssm"):
            return "mamba_ssm is not installed"
        return None if device.type == "cuda" else f"mamba_ssm runs on CUDA; the tensors are on {device.type}"
    raise ValueError(f"No backend is named {name!r}; there are: {', '.join(NAMES)}.")


def choose(op: str, device: torch.device, offered: Sequence[str]) -> Choice:
    """Choose the backend of an op, as `explain` does; a slower one than the best is logged once, with the reason."""
    choice = explain(op, device, offered)
    watched = _watched.get()
    if watched is not None:
        watched[op] = choice
    if choice.slower:
        log_slower(op, choice.name, choice.reason)
    return choice


def beside_triton(op: str, x: torch.Tensor) -> str:
    """Return the name of the backend of an op that has a Triton kernel beside plain torch.

    The kernel takes what a GPU holds (or its interpreter, where that is on), in less than double precision, and is not
    seen by torch.compile.
    """
    on_gpu = x.device.type == "cuda" or triton_interpreted()
    if not on_gpu or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return "torch"
    return choose(op, x.device, ("triton", "numba", "torch", "reference")).name


def explain(op: str, device: torch.device, offered: Sequence[str]) -> Choice:
    """Tell which backend of an op runs on a kind of device, and why.

    Args:
        op: the op's name, for the messages.
        device: where the tensors are.
        offered: the backends that the op has, best first.

    Returns:
        What `use_backend` asks for, else the first that can run. `mamba_ssm` has no kernel but those of the scans: the
        other ops choose for themselves where it is asked for.

    Raises:
        ValueError: `use_backend` asks for one that this op has not or that can't run here.
    """
    forced = _forced.get()
    if forced == "mamba_ssm" and forced not in offered:
        forced = None
    if forced is not None:
        if forced not in offered:
            raise ValueError(f"{op} has no backend {forced!r}; it has: {', '.join(offered)}.")
        refusal = runs(forced, device)
        if refusal is not None:
            raise ValueError(f"Backend {forced!r} can't run {op} here: {refusal}.")
        return Choice(forced, "asked for by use_backend")
    native = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    refused = None
    for name in offered:
        if name == "triton" and device.type == "cpu":
            # The interpreter is for tests, which ask for it by name.
            continue
        refusal = runs(name, device)
        if refusal is None:
            return Choice(name, refused or f"the fastest for {device.type}", slower=refused is not None)
        if name == native:
            refused = refusal
    raise RuntimeError(f"{op} has no backend for {device.type}.")


@functools.cache
def log_slower(op: str, name: str, reason: str) -> None:
    """Say, once a process, that an op runs on a slower backend and why."""
    logger.warning("%s runs on the slower %r backend: %s", op, name, reason)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every op inside the `with` block run on one backend.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in NAMES:
        raise ValueError(f"No backend is named {name!r}; there are: {', '.join(NAMES)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def watch() -> Iterator[dict[str, Choice]]:
    """Yield a dict that gets the choice of each op that runs inside the `with` block."""
    choices: dict[str, Choice] = {}
    token = _watched.set(choices)
    try:
        yield choices
    finally:
        _watched.reset(token)
