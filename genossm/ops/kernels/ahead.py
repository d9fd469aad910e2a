"""Kernels compiled side by side: the first call of an op asks at once for all that it and its gradient will launch.

What an op launches only its code can tell. So a first call runs twice: once over a few positions, forward and backward,
with every launch put off, which finds the kernels, and threads compile them while the op itself begins. Each launch
then waits for its own kernel alone. What isn't found this way, or fails, is compiled where it is launched, as ever.
"""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from genossm.ops import kept

logger = logging.getLogger(__name__)

_POSITIONS = 1 << 14
"""What is longer is cut for the rehearsal: kernels are the same for all lengths."""
_MOST_THREADS = 16


class Call(NamedTuple):
    """A launch that was put off: what decides which code it needs."""

    kernel: Any
    tensors: "tuple[_Like | None, ...]"
    numbers: tuple[float, ...]
    flags: dict[str, Any]


@dataclass(frozen=True)
class _Like:
    """What Triton asks of a tensor to compile for it; a tuple would be one to Triton, too."""

    dtype: torch.dtype
    at: int

    def data_ptr(self) -> int:
        return self.at


class Op(NamedTuple):
    """A call of an autograd function."""

    function: Any
    gradients: bool
    """Whether they are on."""
    autocast: bool
    """Whether it is on where the op is called; inside, ops turn it off."""
    given: tuple[Any, ...]


class _Here(threading.local):
    """What a thread is doing."""

    running: Op | None = None
    """The op whose forward pass runs."""
    put_off: list[Call] | None = None
    """The launches of a rehearsal."""


class _Context:
    """A context for a pass that autograd does not see."""

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.fills = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.fills = value


here = _Here()
_seen: set[tuple[Any, ...]] = set()
_asked: set[tuple[Any, ...]] = set()
_compiling: dict[int, list[Future[None]]] = {}


def together(function: Any) -> Any:
    """Make the kernels of an autograd function be compiled side by side at its first call of a kind."""
    alone = function.apply

    def apply(*given: Any) -> Any:
        if torch.compiler.is_compiling():
            return alone(*given)
        before = here.running
        here.running = Op(function, torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), given)
        try:
            return alone(*given)
        finally:
            here.running = before

    function.apply = staticmethod(apply)
    return function


def put_off(kernel: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], flags: dict[str, Any]) -> None:
    """Note a launch of a rehearsal."""
    assert here.put_off is not None
    # Kernels see complex numbers as pairs of real ones.
    likes = tuple(None if t is None else _Like(t.dtype.to_real(), t.data_ptr() % 16) for t in tensors)
    here.put_off.append(Call(kernel, likes, numbers, flags))


def prepare(kernel: Any, device: int) -> None:
    """Ask for all kernels of the op that runs, if it is the first of its kind, and wait for this one."""
    op = here.running
    if op is not None and _threads() > 1 and not torch.cuda.is_current_stream_capturing():
        key = (device, kind(op))
        if key not in _seen:
            _seen.add(key)
            for call in _rehearsed(op):
                _ask(call, device)
    wait(_compiling.pop(id(kernel), ()))


def kind(op: Op) -> tuple[Any, ...]:
    """Return what tells a call from one that may need other kernels."""
    return op.function, op.autocast, _needs_grad(op), *map(_kind, op.given)


def _needs_grad(op: Op) -> tuple[bool, ...]:
    return tuple(op.gradients and isinstance(x, Tensor) and x.requires_grad for x in op.given)


@contextlib.contextmanager
def _autocast(on: bool) -> Iterator[None]:
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", on)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def rehearse(op: Op) -> None:
    """Run an autograd function over a few positions, and backward if any of what it is given needs a gradient."""
    function, ctx = op.function, _Context(_needs_grad(op))
    with torch.no_grad(), kept.outside():
        with _autocast(op.autocast):
            results = function.forward(ctx, *map(_short, op.given))
        if not any(ctx.needs_input_grad):
            return
        grads = [torch.empty_like(y) for y in ([results] if isinstance(results, Tensor) else results)]
        wholes = [grads]
        if not ctx.fills and len(grads) > 1:
            wholes += [[None if i == j else d for j, d in enumerate(grads)] for i in range(len(grads))]
        # Autograd's own threads know of no autocast.
        with _autocast(False):
            for some in wholes:
                function.backward(ctx, *some)


def _rehearsed(op: Op) -> list[Call]:
    """Return what an op will launch; nothing where a rehearsal fails, for what that means the op itself will say."""
    calls: list[Call] = []
    here.running, here.put_off = None, calls
    try:
        rehearse(op)
    except Exception as problem:
        logger.warning("The kernels of %s are compiled one after the other: %s", op.function.__name__, problem)
    finally:
        here.put_off = None
    return calls


def _ask(call: Call, device: int) -> None:
    """Have a thread compile a kernel, once."""
    key = (device, id(call.kernel), call.tensors, _of_numbers(call), *call.flags.items())
    if key in _asked:
        return
    _asked.add(key)
    # Made here, for it is kept with the kernel: threads must not be at it together.
    _ = call.kernel.cache_key
    _compiling.setdefault(id(call.kernel), []).append(_pool().submit(_compile, call, device))


def _of_numbers(call: Call) -> tuple[Any, ...]:
    """Return what Triton asks of a call's numbers, so that no two threads compile the same."""
    found: list[Any] = []
    for number, parameter in zip(call.numbers, call.kernel.params[len(call.tensors) :], strict=False):
        told = isinstance(number, float) or parameter.do_not_specialize
        found.append((type(number), abs(number) >> 31 > 0 if isinstance(number, int) else False))
        found.append(None if told else (number == 1, number % 16 == 0))
    return tuple(found)


def _compile(call: Call, device: int) -> None:
    with torch.cuda.device(device):
        call.kernel.warmup(*call.tensors, *call.numbers, grid=(1,), **call.flags)


def _threads() -> int:
    return min(_MOST_THREADS, os.cpu_count() or 1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), thread_name_prefix="genossm-compile")


def _kind(x: Any) -> Any:
    """Return what tells an argument from one that needs other kernels: of tensors nothing of their lengths."""
    if isinstance(x, Tensor):
        return x.dtype, x.ndim
    if isinstance(x, list):
        return tuple(map(_kind, cast(list[Any], x)))
    return x


def _short(x: Any) -> Any:
    """Return an argument cut to a few positions, laid out as it is."""
    if not isinstance(x, Tensor):
        return x
    long = [axis for axis, size in enumerate(x.shape) if size > _POSITIONS]
    cut = x[tuple(slice(_POSITIONS) for _ in x.shape)]
    if all(x.stride(axis) != 1 for axis in long):
        return cut
    # Contiguous positions are copied, for that they are so many is seen in the strides of the others.
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return cut.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
