"""Sums over the rows of a long matrix in Triton, in parts that are added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.triton_launch import launch, pieces, power_of_2

_ELEMENTS = 2048
_PROGRAMS = 2112
"""Programs, 16 for each multiprocessor of a large GPU; each adds up some rows."""


@triton.jit(do_not_specialize=["rows", "groups"])
def _add(x, parts, rows, D, groups, x_m, BD: tl.constexpr, R: tl.constexpr):
    column = tl.program_id(0) % groups * BD + tl.arange(0, BD)
    inside = column < D
    first = tl.program_id(0) // groups
    total = tl.zeros([R, BD], tl.float32)
    for block in range(first, tl.cdiv(rows, R), tl.num_programs(0) // groups):
        row = block * R + tl.arange(0, R).to(tl.int64)
        seen = (row < rows)[:, None] & inside[None, :]
        total += tl.load(x + row[:, None] * x_m + column[None, :], seen, 0.0).to(tl.float32)
    tl.store(parts + first * D + column, tl.sum(total, 0), inside)


def column_sum(x_MD: Tensor) -> Tensor:
    """Return the sums over M in float32; channels are contiguous in memory."""
    rows, width = x_MD.shape
    block = min(256, power_of_2(width))
    groups, several = pieces(width, block), _ELEMENTS // block
    programs = max(1, min(_PROGRAMS // groups, pieces(rows, several)))
    parts_PD = torch.empty(programs, width, device=x_MD.device)
    numbers = (rows, width, groups, x_MD.stride(0))
    launch(_add, (programs * groups,), (x_MD, parts_PD), numbers, BD=block, R=several, num_warps=4)
    return parts_PD.sum(0)
