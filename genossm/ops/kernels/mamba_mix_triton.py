"""What stands between the projections of a Mamba on a GPU, both directions at once, keeping next to nothing.

Only the input and the states that enter the scan's tiles are kept; projection, convolution and selection are made again
in the backward pass. The directions add to the same result and the same gradient, so that no two halves are joined. A
checkpointed layer keeps these states and the result, so that none of this runs when the layer is made again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import kept
from genossm.ops.kernels import causal_conv1d_triton
from genossm.ops.kernels.selective_scan_triton import Scan

_PARAMETERS = 7
_PIECE = 1 << 26
"""Values of a result whose rows go through together."""
_SHARE = 64
"""A checkpointed layer keeps a result up to this part of a GPU's memory, and makes it again above: memory counts there.

1,048,576 positions of 512 channels on 80 GB are below it (with the states 1.5 GiB a layer), twice as many above."""


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
        small = kept.inside() and size <= _most_kept(x.device)
        if small and kept.remaking():
            # Not the kept tensor itself, which would get a gradient's history, and another if it is made once more.
            y, *entering = kept.kept()
            y = y.detach()
        else:
            y, entering = _mixed(x, weight, bias, lengths, reverses, parameters, dtype)
            if small:
                kept.keep(y.detach(), *entering)
        ctx.save_for_backward(x, weight, bias, lengths, *parameters, *entering)
        ctx.reverses = reverses
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lengths, *saved = ctx.saved_tensors
        ways = len(ctx.reverses)
        entering = iter(saved[ways * _PARAMETERS :])
        dy = grads[0].contiguous()
        d_x = torch.empty_like(x)
        total: list[Tensor | None] = []
        for rows in _pieces(dy):
            xz = _projected(x[rows], weight, bias, dy.dtype)
            d_xz = d_x[rows] if weight is None else torch.empty_like(xz)
            (a, z), (da, dz) = xz.chunk(2, dim=-1), d_xz.chunk(2, dim=-1)
            found: list[Tensor | None] = []
            for index, reverse in enumerate(ctx.reverses):
                found += _direction_backward(
                    *(dy[rows], a, z, _of(lengths, rows), reverse),
                    *(saved[index * _PARAMETERS : (index + 1) * _PARAMETERS], next(entering), da, dz, index > 0),
                )
            if weight is not None:
                d_xz, here = d_xz.flatten(0, 1), x[rows].to(dy.dtype).flatten(0, 1)
                _write(d_x[rows].flatten(0, 1), d_xz, weight.to(dy.dtype))
                found = [d_xz.T @ here, None if bias is None else d_xz.sum(0, dtype=torch.float32), *found]
            total = found if not total else [_sum(*pair) for pair in zip(total, found, strict=True)]
        owners = [*([] if weight is None else [weight, bias]), *saved[: ways * _PARAMETERS]]
        typed = [None if d is None or p is None else d.to(p.dtype) for d, p in zip(total, owners, strict=True)]
        return (d_x, *(typed[:2] if weight is not None else (None, None)), None, None, *typed[-ways * _PARAMETERS :])


def _mixed(
    x: Tensor,
    weight: Tensor | None,
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
            a, z = _projected(x[rows], weight, bias, dtype).chunk(2, dim=-1)
            for index, reverse in enumerate(reverses):
                _, _, scan = _selected(a, z, _of(lengths, rows), reverse, parameters[index * _PARAMETERS :])
                entering.append(scan.enter(scan.u, None, adjoint=False)[0])
                scan.forward(entering[-1], y[rows], add=index > 0)
    return y, entering


def _most_kept(device: torch.device) -> int:
    """Return the bytes of the largest result that a checkpointed layer keeps."""
    cuda = device.type == "cuda"
    return (torch.cuda.get_device_properties(device).total_memory if cuda else 1 << 36) // _SHARE


def _write(to: Tensor, x: Tensor, w: Tensor) -> None:
    """Write x w where it belongs, with no copy where dtypes are one."""
    if to.dtype == x.dtype:
        torch.mm(x, w, out=to)
    else:
        to.copy_(x @ w)


def _pieces(y: Tensor) -> list[slice]:
    """Return the rows that go through at once: what a long one needs on its way is as large as what is kept."""
    several = max(1, _PIECE // y[0].numel())
    return [slice(first, first + several) for first in range(0, len(y), several)]


def _of(lengths: Tensor | None, rows: slice) -> Tensor | None:
    return None if lengths is None else lengths[rows]


def _projected(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight is None:
        return x
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one.float() + other.float()


def _selected(
    x: Tensor, z: Tensor, lengths: Tensor | None, reverse: bool, parameters: Any
) -> tuple[Tensor, Tensor, Scan]:
    """Return the selection's projection, the weight that makes steps of it, and the scan of one direction."""
    w, bias, x_proj, dt_proj, dt_bias, A, D = parameters[:_PARAMETERS]
    u = causal_conv1d_triton.convolve(x, w, bias, lengths, silu=True, reverse=reverse, y=_empty(x))
    rank, states = dt_proj.shape[1], A.shape[1]
    selection = u @ _aligned(x_proj, u.dtype).T
    dt_proj = dt_proj.to(u.dtype)
    low, B, C = selection.split([rank, states, states], dim=-1)
    dt = _empty(x)
    torch.mm(low.flatten(0, 1), dt_proj.T, out=dt.flatten(0, 1))
    return selection, dt_proj, Scan(u, dt, A, B, C, D, z, dt_bias, None, lengths, True, reverse)


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor whose rows begin at multiples of 16 bytes, without which a product takes twice as long."""
    dtype = dtype or like.dtype
    step = 16 // dtype.itemsize
    shape = (*like.shape[:-1], -(-like.shape[-1] // step) * step)
    return torch.empty(shape, dtype=dtype, device=like.device)[..., : like.shape[-1]]


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype with such rows."""
    return _empty(weight, dtype).copy_(weight)


def _direction_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    parameters: Any,
    entering: Tensor,
    dx: Tensor,
    dz: Tensor,
    add: bool,
) -> list[Tensor | None]:
    """Write (or add) the gradients of x and z; return those of one direction's parameters."""
    w, bias, x_proj, *_ = parameters
    selection, dt_proj, scan = _selected(x, z, lengths, reverse, parameters)
    rank = dt_proj.shape[1]
    adjoint, _ = scan.enter(dy, None, adjoint=True)
    # A program reads all that it needs of its steps before it writes their gradient, and nothing else needs them.
    du, ddt = _empty(scan.u), scan.dt
    d_selection = torch.empty_like(selection)
    d_BC = d_selection[..., rank:].unflatten(-1, (2, scan.states)).permute(2, 0, 1, 3)
    dA, dD, d_bias = scan.backward(dy, entering, adjoint, du, ddt, dz, d_BC, add)
    d_selection, ddt = d_selection.flatten(0, 1), ddt.flatten(0, 1)
    _write(d_selection[:, :rank], ddt, dt_proj)
    d_dt_proj = ddt.T @ selection.flatten(0, 1)[:, :rank]
    d_x_proj = d_selection.T @ scan.u.flatten(0, 1)
    du.flatten(0, 1).addmm_(d_selection, _aligned(x_proj, du.dtype))
    _, dw, d_conv_bias = causal_conv1d_triton.convolve_backward(
        du, x, w, bias, lengths, silu=True, reverse=reverse, dx=dx, add=add
    )
    return [dw, d_conv_bias, d_x_proj, d_dt_proj, d_bias, dA, dD]
