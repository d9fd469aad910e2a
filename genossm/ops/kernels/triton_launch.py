"""How our Triton kernels are launched: what was launched before is launched again without asking Triton what it is.

Triton looks at every argument of every call, of which a scan has sixty: its type, whether a pointer is aligned, whether
a number is 1 or a multiple of 16; and the driver is asked of each tensor where it lies. Here a call is known by its
numbers and flags as they are and by each tensor's dtype and alignment, which decide all of that.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from genossm.ops.kernels import ahead

_MOST = 4096
"""Calls of one kernel that are known at once: numbers are lengths and strides, which may be others every time."""
_PARAMETERS = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
"""What a launcher takes before what the kernel takes, in every Triton that is launched directly."""


class _Known(NamedTuple):
    """A compiled kernel and what it takes beside pointers."""

    run: Callable[..., None]
    function: int
    metadata: Any
    rest: tuple[Any, ...]


_runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
_known: dict[int, tuple[Any, dict[tuple[Any, ...], _Known]]] = {}
"""By kernel, which is held so that no other one gets its id: what was launched, by device and `call_key`."""


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], **flags: Any
) -> None:
    """Launch `kernel[grid](*tensors, *numbers, **flags)` on the device and the current stream of its tensors.

    Args:
        kernel: a function of `triton.jit`, which takes tensors, then numbers, then constants.
        grid: programs along up to three axes.
        tensors: the first is not None; kernels see complex numbers as pairs of real ones.
        numbers: Python's own.
        flags: constants and options of the compiler, hashable.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and ahead.here.put_off is not None:
        ahead.put_off(kernel, tensors, numbers, flags)
        return
    device = tensors[0].get_device() if tensors[0] is not None else -1
    if device < 0 or compiling or _watched():
        kernel[grid](*_real(tensors), *numbers, **flags)
        return
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, **flags)
        return
    pointers, key = call_key(tensors, numbers, flags)
    _, calls = _known.setdefault(id(kernel), (kernel, {}))
    known = calls.get((device, key))
    if known is None:
        ahead.prepare(kernel, device)
        _first(kernel, grid, tensors, numbers, flags, calls, (device, key))
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    x, y, z = (*grid, 1, 1)[:3]
    known.run(x, y, z, stream, known.function, known.metadata, None, None, None, *pointers, *known.rest)


def call_key(
    tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], flags: dict[str, Any]
) -> tuple[list[int | None], tuple[Any, ...]]:
    """Return where tensors lie, and what tells two calls apart that need different code."""
    pointers: list[int | None] = []
    kinds: list[torch.dtype | None] = []
    odd = 0
    for tensor in tensors:
        odd *= 2
        if tensor is None:
            pointers.append(None)
            kinds.append(None)
        else:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            kinds.append(tensor.dtype)
            odd += pointer % 16 != 0
    return pointers, (odd, numbers, *kinds, *flags, *flags.values())


def pieces(count: int, size: int) -> int:
    """Return how many pieces of a size hold so many: Triton's own takes Python some ten times as long."""
    return -(-count // size)


def power_of_2(least: int) -> int:
    """Return the smallest power of two of at least `least`, as quickly."""
    return 1 << max(0, least - 1).bit_length()


def _real(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [x if x is None or not x.is_complex() else torch.view_as_real(x) for x in tensors]


def _watched() -> bool:
    """Tell whether launches must go through Triton: somebody's hooks want to see them, or it is too old to have any."""
    if _runtime is None:
        return True
    for hook in (_runtime.launch_enter_hook, _runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def _first(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    flags: dict[str, Any],
    calls: dict[tuple[Any, ...], _Known],
    key: tuple[Any, ...],
) -> None:
    """Launch through Triton, which compiles what it must, and remember the result where it is of a kind we know."""
    compiled = kernel[grid](*_real(tensors), *numbers, **flags)
    run = getattr(compiled, "run", None)
    if run is None or list(inspect.signature(type(run).__call__).parameters)[: len(_PARAMETERS)] != _PARAMETERS:
        return
    if len(calls) >= _MOST:
        calls.clear()
    constants = kernel.arg_names[len(tensors) + len(numbers) :]
    rest = (*numbers, *(flags[name] for name in constants))
    calls[key] = _Known(run, compiled.function, compiled.packed_metadata, rest)
