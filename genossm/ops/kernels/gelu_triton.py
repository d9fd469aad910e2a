"""The backward pass of a linear layer's GELU in Triton: both of what its neighbours' gradients need in one pass.

Of the layer's result h and the gradient d behind the GELU it makes GELU(h), where h stands, and the gradient before it,
where d stands, and adds that up for the bias. Sums are written in parts, program by program, and added in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.triton_launch import launch, pieces, power_of_2
from genossm.ops.kernels.triton_parts import sigmoid

_ELEMENTS = 1024
_PROGRAMS = 4224
"""Programs, 32 for each multiprocessor of a large GPU; each adds up its rows' parts."""
_ROOT = tl.constexpr(1.5957691216057308)
"""2 sqrt(2 / pi): 0.5 (1 + tanh x) is the logistic function of 2 x."""
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _place(block, column, rows, F, R: tl.constexpr):
    row = block * R + tl.arange(0, R).to(tl.int64)
    return row[:, None] * F + column[None, :], (row < rows)[:, None] & (column < F)[None, :]


@triton.jit(do_not_specialize=["rows", "groups"])
def _backward(h, d, parts, rows, F, groups, BF: tl.constexpr, R: tl.constexpr):
    column = tl.program_id(0) % groups * BF + tl.arange(0, BF)
    first = tl.program_id(0) // groups
    step = tl.num_programs(0) // groups
    at, seen = _place(first, column, rows, F, R)
    x_ahead = tl.load(h + at, seen, 0.0)
    grad_ahead = tl.load(d + at, seen, 0.0)
    # Rows are added up at the end alone: a sum over them inside the loop would make all warps wait for each other.
    total = tl.zeros([R, BF], tl.float32)
    for block in range(first, tl.cdiv(rows, R), step):
        x = x_ahead.to(tl.float32)
        grad = grad_ahead.to(tl.float32)
        ahead, there = _place(block + step, column, rows, F, R)
        x_ahead = tl.load(h + ahead, there, 0.0)
        grad_ahead = tl.load(d + ahead, there, 0.0)
        at, seen = _place(block, column, rows, F, R)
        square = x * x
        s = sigmoid(x * _ROOT * (square * _CUBE + 1.0))
        tl.store(h + at, (x * s).to(h.dtype.element_ty), seen)
        grad *= s + x * s * (1.0 - s) * _ROOT * (square * _CUBE * 3.0 + 1.0)
        tl.store(d + at, grad.to(d.dtype.element_ty), seen)
        total += grad
    tl.store(parts + first * F + column, tl.sum(total, 0), column < F)


def backward(h_MF: Tensor, d_MF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU(h) in the memory of h, the gradient before it in that of d, and the sum of that over M in float32."""
    rows, width = h_MF.shape
    block = min(256, power_of_2(width))
    groups, several = pieces(width, block), _ELEMENTS // block
    programs = max(1, min(_PROGRAMS // groups, pieces(rows, several)))
    parts_PF = torch.empty(programs, width, device=h_MF.device)
    numbers = (rows, width, groups)
    launch(_backward, (programs * groups,), (h_MF, d_MF, parts_PF), numbers, BF=block, R=several, num_warps=4)
    return h_MF, d_MF, parts_PF.sum(0)
