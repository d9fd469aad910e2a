"""Residual addition and norm in one pass over memory each way; the sum stays as wide as the residual stream."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch, pieces, power_of_2

_PROGRAMS = 2112
"""Programs of the backward kernel, 16 for each multiprocessor of a large GPU; each adds up its rows' parts."""


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, y, w, b, total, out, rows, D, eps, RMS: tl.constexpr, HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr,
    BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    channel = tl.arange(0, BD)
    inside = channel < D
    at = row[:, None] * D + channel[None, :]
    seen = (row < rows)[:, None] & inside[None, :]
    value = tl.load(x + at, seen, 0.0).to(tl.float32)
    if HAS_Y:
        value += tl.load(y + at, seen, 0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), seen)
    if not RMS:
        value -= (tl.sum(value, 1) / D)[:, None]
        value = tl.where(inside[None, :], value, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    result = value * scale[:, None] * tl.load(w + channel, inside, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        result += tl.load(b + channel, inside, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), seen)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    total, w, d_total, d_out, dx, dy, parts, rows, D, eps, RMS: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_Y: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BD)
    inside = channel < D
    weight = tl.load(w + channel, inside, 0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BD], tl.float32)
    db = tl.zeros([BD], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = block * R + tl.arange(0, R).to(tl.int64)
        at = row[:, None] * D + channel[None, :]
        seen = (row < rows)[:, None] & inside[None, :]
        value = tl.load(total + at, seen, 0.0).to(tl.float32)
        grad = tl.load(d_out + at, seen, 0.0).to(tl.float32)
        if not RMS:
            value -= (tl.sum(value, 1) / D)[:, None]
            value = tl.where(seen, value, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
        value = value * scale[:, None]
        dw += tl.sum(grad * value, 0)
        db += tl.sum(grad, 0)
        grad = grad * weight
        grad -= value * (tl.sum(grad * value, 1) / D)[:, None] + (0.0 if RMS else (tl.sum(grad, 1) / D)[:, None])
        result = grad * scale[:, None]
        if HAS_TOTAL:
            result += tl.load(d_total + at, seen, 0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), seen)
        if HAS_Y:
            tl.store(dy + at, result.to(dy.dtype.element_ty), seen)
    at = parts + tl.program_id(0) * 2 * D + channel
    tl.store(at, dw, inside)
    tl.store(at + D, db, inside)


@together
class AddNorm(torch.autograd.Function):
    """x, y, weight, bias, eps, rms, the normed dtype -> x + y (or x itself) and its norm."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        x, y, weight, bias, eps, rms, dtype = given
        x = x.contiguous()
        width = x.shape[-1]
        total = x if y is None else torch.empty_like(x)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        block, several = _shape(width)
        rows = x.numel() // width
        launch(
            _forward, (pieces(rows, several),),
            (x, None if y is None else y.contiguous(), weight, bias, total, out), (rows, width, eps), RMS=rms,
            HAS_Y=y is not None, HAS_BIAS=bias is not None, BD=block, R=several, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(total, weight)
        ctx.options = (eps, rms, None if y is None else y.dtype, bias is not None)
        ctx.set_materialize_grads(False)
        return total if y is not None else x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        eps, rms, y_dtype, has_bias = ctx.options
        d_total, d_out = grads
        if d_out is None:
            return d_total, None if y_dtype is None or d_total is None else d_total.to(y_dtype), *[None] * 5
        width = total.shape[-1]
        rows = total.numel() // width
        dx = torch.empty_like(total)
        dy = None if y_dtype is None else torch.empty_like(total, dtype=y_dtype)
        block, several = _shape(width)
        programs = min(_PROGRAMS, pieces(rows, several))
        parts = torch.empty(programs, 2, width, device=total.device)
        d_total = None if d_total is None else d_total.contiguous()
        launch(
            _backward, (programs,), (total, weight, d_total, d_out.contiguous(), dx, dy, parts), (rows, width, eps),
            RMS=rms, HAS_TOTAL=d_total is not None, HAS_Y=dy is not None, BD=block, R=several, num_warps=1,
        )  # fmt: skip
        dw, db = parts.sum(0).to(weight.dtype)
        return dx, dy, dw, db if has_bias else None, None, None, None


def _shape(width: int) -> tuple[int, int]:
    """Return the padded width and the rows that a program holds at once."""
    block = power_of_2(width)
    return block, max(1, 1024 // block)
