"""Rotary positions in Triton: one pass over memory each way; backward turns the other way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch, pieces, power_of_2

_PAIRS = 1024
"""Pairs of features of a program."""


@triton.jit(do_not_specialize=["L"])
def _rotate(
    x, cos, sin, out, L, H, half, x_b, x_l, x_h, x_p, BACK: tl.constexpr, BP: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    p = tl.arange(0, BP)
    batch = tl.program_id(1).to(tl.int64)
    t = (row // H).to(tl.int64)
    seen = (t < L)[:, None] & (p < half)[None, :]
    table = t[:, None] * half + p[None, :]
    c = tl.load(cos + table, seen, 0.0).to(tl.float32)
    s = tl.load(sin + table, seen, 0.0).to(tl.float32)
    s = -s if BACK else s
    at = x + batch * x_b + t[:, None] * x_l + (row % H)[:, None] * x_h + p[None, :] * x_p
    first = tl.load(at, seen, 0.0).to(tl.float32)
    second = tl.load(at + half * x_p, seen, 0.0).to(tl.float32)
    to = out + ((batch * L + t) * H + row % H)[:, None] * half * 2 + p[None, :]
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), seen)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), seen)


@together
class Rotate(torch.autograd.Function):
    """x, cos, sin -> the turned heads; tensors as in `genossm.ops.rotary`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, cos, sin = given
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _run(grads[0], *ctx.saved_tensors, True), None, None


def _run(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    batch, length, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_2(max(1, width // 2))
    rows = max(1, _PAIRS // block)
    launch(
        _rotate, (pieces(length * heads, rows), batch), (x, cos.contiguous(), sin.contiguous(), out),
        (length, heads, width // 2, *x.stride()), BACK=back, BP=block, R=rows,
    )  # fmt: skip
    return out
