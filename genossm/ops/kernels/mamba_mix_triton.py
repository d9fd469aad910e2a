"""What stands between the projections of a Mamba on a GPU, both directions at once, keeping next to nothing.

Only the input and the states that enter the scan's tiles are kept; projection, convolution and selection are made again
in the backward pass. The directions add to the same result and the same gradient, so that no two halves are joined. A
checkpointed layer keeps these states and the result, so that none of this runs when the layer is made again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import kept
from genossm.ops.kernels import causal_conv1d_triton
from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.selective_scan_triton import Scan

_PARAMETERS = 7
_PIECE = 1 << 26
"""Values of a result whose rows go through together."""
_SHARE = 64
"""A checkpointed layer keeps a result up to this part of a GPU's memory, and makes it again above: memory counts there.

1,048,576 positions of 512 channels on 80 GB are below it (with the states 1.5 GiB a layer), twice as many above."""


@together
class MambaMix(torch.autograd.Function):
    """x, weight and bias of the projection in, lengths, directions' `reverse`, then 7 parameters a direction -> y.

    Tensors are as in `genossm.ops.mamba_mix`.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, lengths, reverses, *parameters = given
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        dtype = x.dtype if weight is None else dtype
        size = x.shape[0] * x.shape[1] * parameters[0].shape[0] * dtype.itemsize
        weights = _weights(weight, parameters, len(reverses), dtype)
        small = kept.inside() and size <= _most_kept(x.device)
        if small and kept.remaking():
            # Not the kept tensor itself, which would get a gradient's history, and another if it is made once more.
            y, *entering = kept.kept()
            y = y.detach()
        else:
            y, entering = _mixed(x, weights, bias, lengths, reverses, parameters, dtype)
            if small:
                kept.keep(y.detach(), *entering)
        ctx.save_for_backward(x, weight, bias, lengths, *parameters, *entering)
        ctx.reverses, ctx.weights = reverses, weights
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lengths, *saved = ctx.saved_tensors
        ways, weights = len(ctx.reverses), ctx.weights
        entering = iter(saved[ways * _PARAMETERS :])
        dy = grads[0].contiguous()
        d_x = torch.empty_like(x)
        total: list[Tensor | None] = []
        for rows in _pieces(dy):
            here = x[rows] if weights.of_x is None else _fitted(x[rows], dy.dtype, columns=weights.of_x.shape[1])
            xz = _projected(here, weights.of_x, bias)
            d_xz = d_x[rows] if weights.of_x is None else torch.empty_like(xz)
            (a, z), (da, dz) = xz.chunk(2, dim=-1), d_xz.chunk(2, dim=-1)
            found: list[Tensor | None] = []
            for index, reverse in enumerate(ctx.reverses):
                found += _direction_backward(
                    *(dy[rows], a, z, _of(lengths, rows), reverse, weights.selecting[index]),
                    *(saved[index * _PARAMETERS : (index + 1) * _PARAMETERS], next(entering), da, dz, index > 0),
                )
            if weights.of_x is not None:
                d_xz, here = d_xz.flatten(0, 1), here.flatten(0, 1)
                _write(d_x[rows].flatten(0, 1), d_xz, weights.of_x)
                d_weight = (d_xz.T @ here)[:, : x.shape[2]]
                found = [d_weight, None if bias is None else d_xz.sum(0, dtype=torch.float32), *found]
            total = found if not total else [_sum(*pair) for pair in zip(total, found, strict=True)]
        owners = [*([] if weight is None else [weight, bias]), *saved[: ways * _PARAMETERS]]
        typed = [None if d is None or p is None else d.to(p.dtype) for d, p in zip(total, owners, strict=True)]
        return (d_x, *(typed[:2] if weight is not None else (None, None)), None, None, *typed[-ways * _PARAMETERS :])


class _Weights(NamedTuple):
    """What products take, in their dtype and as wide as they are fast, for the forward and the backward pass."""

    of_x: Tensor | None
    """The projection's."""
    selecting: list[tuple[Tensor, Tensor]]
    """Each direction's two that select."""


def _weights(weight: Tensor | None, parameters: list[Any], ways: int, dtype: torch.dtype) -> _Weights:
    selecting: list[tuple[Tensor, Tensor]] = []
    for way in range(ways):
        x_proj, dt_proj = parameters[way * _PARAMETERS + 2 : way * _PARAMETERS + 4]
        whole = _whole(x_proj.shape[1], dtype)
        selecting.append((_fitted(x_proj, dtype, columns=whole), _fitted(dt_proj, dtype, rows=whole)))
    of_x = None if weight is None else _fitted(weight, dtype, columns=_whole(weight.shape[1], dtype))
    return _Weights(of_x, selecting)


def _mixed(
    x: Tensor,
    weights: _Weights,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverses: list[bool],
    parameters: list[Any],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Return the result and the states that enter tiles, by piece and direction."""
    y = torch.empty(*x.shape[:2], parameters[0].shape[0], dtype=dtype, device=x.device)
    entering: list[Tensor] = []
    with torch.autocast("cuda", enabled=False):
        for rows in _pieces(y):
            a, z = _projected(x[rows], weights.of_x, bias).chunk(2, dim=-1)
            for index, reverse in enumerate(reverses):
                own = parameters[index * _PARAMETERS :]
                scan = _selected(a, z, _of(lengths, rows), reverse, weights.selecting[index], own).scan
                entering.append(scan.enter(scan.u, None, adjoint=False)[0])
                scan.forward(entering[-1], y[rows], add=index > 0)
    return y, entering


def _most_kept(device: torch.device) -> int:
    """Return the bytes of the largest result that a checkpointed layer keeps."""
    cuda = device.type == "cuda"
    return (torch.cuda.get_device_properties(device).total_memory if cuda else 1 << 36) // _SHARE


def _write(to: Tensor, x: Tensor, w: Tensor) -> None:
    """Write x w, up to the width of `to`, with no copy where width and dtype are the same."""
    if to.dtype == x.dtype and to.shape[1] == w.shape[1]:
        torch.mm(x, w, out=to)
    else:
        to.copy_((x @ w)[:, : to.shape[1]])


def _pieces(y: Tensor) -> list[slice]:
    """Return the rows that go through at once: what a long one needs on its way is as large as what is kept."""
    several = max(1, _PIECE // y[0].numel())
    return [slice(first, first + several) for first in range(0, len(y), several)]


def _of(lengths: Tensor | None, rows: slice) -> Tensor | None:
    return None if lengths is None else lengths[rows]


def _projected(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    x = _fitted(x, weight.dtype, columns=weight.shape[1])
    return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one.float() + other.float()


class _Way(NamedTuple):
    """One direction up to its scan. Rows are `_whole`, so that products take their fast way; what is added is 0."""

    selection_MC: Tensor
    u_MX: Tensor
    """The convolved input, which the scan sees without what is added."""
    dt_MX: Tensor
    """Its steps, likewise."""
    scan: Scan


def _selected(
    x: Tensor,
    z: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    selecting: tuple[Tensor, Tensor],
    parameters: Any,
    gradients: bool = False,
) -> _Way:
    """Convolve and select."""
    w, bias, _, _, dt_bias, A, D = parameters[:_PARAMETERS]
    x_proj, dt_proj = selecting
    batch, length, width = x.shape
    rank, states, whole = dt_proj.shape[1], A.shape[1], dt_proj.shape[0]
    u = torch.empty(batch, length, whole, dtype=x.dtype, device=x.device)
    if whole > width:
        u[..., width:] = 0
    causal_conv1d_triton.convolve(x, w, bias, lengths, silu=True, reverse=reverse, y=u[..., :width])
    selection = u.flatten(0, 1) @ x_proj.T
    dt = selection[:, :rank] @ dt_proj.T
    _, B, C = selection.view(batch, length, -1).split([rank, states, states], dim=-1)
    steps = dt.view(batch, length, whole)[..., :width]
    scan = Scan(u[..., :width], steps, A, B, C, D, z, dt_bias, None, lengths, True, reverse, gradients)
    return _Way(selection, u.flatten(0, 1), dt, scan)


def _whole(width: int, dtype: torch.dtype) -> int:
    """Return the next width in multiples of 16 bytes: a product of others takes twice as long."""
    step = 16 // dtype.itemsize
    return -(-width // step) * step


def _fitted(x: Tensor, dtype: torch.dtype, rows: int = 0, columns: int = 0) -> Tensor:
    """Return x in another dtype with zeros up to so many rows and columns, or as it is where it has them."""
    more = (0, max(0, columns - x.shape[-1]), 0, max(0, rows - x.shape[-2]))
    return F.pad(x.to(dtype), more) if any(more) else x.to(dtype)


def _direction_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    selecting: tuple[Tensor, Tensor],
    parameters: Any,
    entering: Tensor,
    dx: Tensor,
    dz: Tensor,
    add: bool,
) -> list[Tensor | None]:
    """Write (or add) the gradients of x and z; return those of one direction's parameters."""
    w, bias = parameters[:2]
    x_proj, dt_proj = selecting
    selection, u, ddt, scan = _selected(x, z, lengths, reverse, selecting, parameters, gradients=True)
    (batch, length, width), rank = x.shape, dt_proj.shape[1]
    adjoint, _ = scan.enter(dy, None, adjoint=True)
    du, d_selection = torch.empty_like(u), torch.empty_like(selection)
    d_u = du.view(batch, length, -1)[..., :width]
    d_BC = d_selection[:, rank:].view(batch, length, 2, scan.states).permute(2, 0, 1, 3)
    # A program reads all that it needs of its steps before it writes their gradient, and nothing else needs them.
    dA, dD, d_bias = scan.backward(dy, entering, adjoint, d_u, scan.dt, dz, d_BC, add)
    torch.mm(ddt, dt_proj, out=d_selection[:, :rank])
    d_dt_proj = (ddt.T @ selection[:, :rank])[:width]
    d_x_proj = (d_selection.T @ u)[:, :width]
    du.addmm_(d_selection, x_proj)
    _, dw, d_conv_bias = causal_conv1d_triton.convolve_backward(
        d_u, x, w, bias, lengths, silu=True, reverse=reverse, dx=dx, add=add
    )
    return [dw, d_conv_bias, d_x_proj, d_dt_proj, d_bias, dA, dD]
