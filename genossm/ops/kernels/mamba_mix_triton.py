"""What stands between the projections of a Mamba on a GPU, both directions at once, keeping next to nothing.

Only the projected input and the states that enter the scan's tiles are kept; convolution and selection are made again
in the backward pass. The directions add to the same result and the same gradient, so that no two halves are joined.
"""

from typing import Any

import torch
from torch import Tensor

from genossm.ops.kernels import causal_conv1d_triton
from genossm.ops.kernels.selective_scan_triton import Scan

_PARAMETERS = 7


class MambaMix(torch.autograd.Function):
    """xz, lengths, directions' `reverse`, then 7 parameters a direction -> y; tensors as in `genossm.ops.mamba_mix`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        xz, lengths, reverses, *parameters = given
        x, z = xz.chunk(2, dim=-1)
        y = torch.empty(x.shape, dtype=xz.dtype, device=xz.device)
        entering: list[Tensor] = []
        with torch.autocast("cuda", enabled=False):
            for index, reverse in enumerate(reverses):
                _, _, scan = _selected(x, z, lengths, reverse, parameters[index * _PARAMETERS :])
                entering.append(scan.enter(scan.u, None, adjoint=False)[0])
                scan.forward(entering[-1], y, add=index > 0)
        ctx.save_for_backward(xz, lengths, *parameters, *entering)
        ctx.reverses = reverses
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xz, lengths, *saved = ctx.saved_tensors
        x, z = xz.chunk(2, dim=-1)
        d_xz = torch.empty_like(xz)
        dx, dz = d_xz.chunk(2, dim=-1)
        found: list[Tensor | None] = []
        for index, reverse in enumerate(ctx.reverses):
            parameters = saved[index * _PARAMETERS : (index + 1) * _PARAMETERS]
            entering = saved[len(ctx.reverses) * _PARAMETERS + index]
            found += _direction_backward(
                grads[0].contiguous(), x, z, lengths, reverse, parameters, entering, dx, dz, index > 0
            )
        typed = (
            None if d is None or p is None else d.to(p.dtype)
            for d, p in zip(found, saved[: len(found)], strict=True)
        )  # fmt: skip
        return (d_xz, None, None, *typed)


def _selected(
    x: Tensor, z: Tensor, lengths: Tensor | None, reverse: bool, parameters: Any
) -> tuple[Tensor, Tensor, Scan]:
    """Return the selection's projection, the weight that makes steps of it, and the scan of one direction."""
    w, bias, x_proj, dt_proj, dt_bias, A, D = parameters[:_PARAMETERS]
    u = causal_conv1d_triton.convolve(x, w, bias, lengths, silu=True, reverse=reverse)
    rank, states = dt_proj.shape[1], A.shape[1]
    selection = u @ x_proj.to(u.dtype).T
    dt_proj = dt_proj.to(u.dtype)
    dt, B, C = selection.split([rank, states, states], dim=-1)
    return selection, dt_proj, Scan(u, dt @ dt_proj.T, A, B, C, D, z, dt_bias, None, lengths, True, reverse)


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
    du, ddt = torch.empty_like(scan.u), torch.empty_like(scan.dt)
    dA, dB, dC, dD, d_bias = scan.backward(dy, entering, adjoint, du, ddt, dz, add)
    d_selection = torch.cat([ddt @ dt_proj, dB.to(du.dtype), dC.to(du.dtype)], dim=-1).flatten(0, 1)
    d_dt_proj = ddt.flatten(0, 1).T @ selection.flatten(0, 1)[:, :rank]
    d_x_proj = d_selection.T @ scan.u.flatten(0, 1)
    du.flatten(0, 1).addmm_(d_selection, x_proj.to(du.dtype))
    _, dw, d_conv_bias = causal_conv1d_triton.convolve_backward(
        du, x, w, bias, lengths, silu=True, reverse=reverse, dx=dx, add=add
    )
    return [dw, d_conv_bias, d_x_proj, d_dt_proj, d_bias, dA, dD]
