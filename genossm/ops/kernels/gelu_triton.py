"""The backward pass of a linear layer's GELU in Triton: both of what its neighbours' gradients need in one pass.

Of the layer's result h and the gradient d behind the GELU it makes GELU(h), where h stands, and the gradient before it,
where d stands, and adds that up for the bias. Sums are written in parts, program by program, and added in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.triton_parts import sigmoid

_ELEMENTS = 2048
_PROGRAMS = 1056
"""Programs, 8 for each multiprocessor of a large GPU; each adds up its rows' parts."""
_ROOT = tl.constexpr(1.5957691216057308)
"""2 sqrt(2 / pi): 0.5 (1 + tanh x) is the logistic function of 2 x."""
_CUBE = tl.constexpr(0.044715)


@triton.jit
def _backward(h, d, parts, rows, F, groups, BF: tl.constexpr, R: tl.constexpr):
    column = tl.program_id(0) % groups * BF + tl.arange(0, BF)
    inside = column < F
    first = tl.program_id(0) // groups
    total = tl.zeros([BF], tl.float32)
    for block in range(first, tl.cdiv(rows, R), tl.num_programs(0) // groups):
        row = block * R + tl.arange(0, R).to(tl.int64)
        at = row[:, None] * F + column[None, :]
        seen = (row < rows)[:, None] & inside[None, :]
        x = tl.load(h + at, seen, 0.0).to(tl.float32)
        grad = tl.load(d + at, seen, 0.0).to(tl.float32)
        square = x * x
        s = sigmoid(x * _ROOT * (square * _CUBE + 1.0))
        tl.store(h + at, (x * s).to(h.dtype.element_ty), seen)
        grad *= s + x * s * (1.0 - s) * _ROOT * (square * _CUBE * 3.0 + 1.0)
        rounded = grad.to(d.dtype.element_ty)
        tl.store(d + at, rounded, seen)
        total += tl.sum(grad, 0)
    tl.store(parts + first * F + column, total, inside)


def backward(h_MF: Tensor, d_MF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU(h) in the memory of h, the gradient before it in that of d, and the sum of that over M in float32."""
    rows, width = h_MF.shape
    block = min(256, triton.next_power_of_2(width))
    groups, several = triton.cdiv(width, block), _ELEMENTS // block
    programs = max(1, min(_PROGRAMS // groups, triton.cdiv(rows, several)))
    parts_PF = torch.empty(programs, width, device=h_MF.device)
    _backward[(programs * groups,)](h_MF, d_MF, parts_PF, rows, width, groups, BF=block, R=several, num_warps=4)
    return h_MF, d_MF, parts_PF.sum(0)
