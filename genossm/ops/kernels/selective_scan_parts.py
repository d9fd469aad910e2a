"""What stands before and behind the walks of the selective scan: inputs in the form that they read, sums over parts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.triton_launch import launch
from genossm.ops.kernels.triton_parts import in_rows, row_strides

_LOG2E = tl.constexpr(1.4426950408889634)
_ROWS = 64
"""Positions, or channels of A, of a program."""


@triton.jit(do_not_specialize=["L", "P", "blocks", "B_rows", "C_rows"])
def _prepare(
    A, B, C, A_out, B_out, C_out, E, L, P, S, blocks, A_e, A_n, B_rows, B_l, B_n, C_rows, C_l, C_n,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write B and C as (rows, P, N) and A log2(e) as (N, E), 0 beyond the S states and the L positions."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    n = tl.arange(0, N)[None, :]
    if block < blocks:
        t = (block * R + tl.arange(0, R).to(tl.int64))[:, None]
        seen = (t < L) & (n < S)
        there = (t < P) & (n < N)
        to = (row * P + t) * N + n
        b = tl.load(B + (row * B_rows + t) * B_l + n * B_n, seen, 0.0)
        c = tl.load(C + (row * C_rows + t) * C_l + n * C_n, seen, 0.0)
        tl.store(B_out + to, b.to(B_out.dtype.element_ty), there)
        tl.store(C_out + to, c.to(C_out.dtype.element_ty), there)
    elif row == 0:
        e = ((block - blocks) * R + tl.arange(0, R))[:, None]
        rates = tl.load(A + e * A_e + n * A_n, (e < E) & (n < S), 0.0).to(tl.float32) * _LOG2E
        tl.store(A_out + n * E + e, rates, (e < E) & (n < N))


def prepare(
    A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, states: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A log2(e), float32, and B and C as the walks read them: (N, E), (B, L, N), zeros up to `states`, `length`.

    Op by op these would be seven launches, which take longer than a short scan.
    """
    (width, given), (batch, real, _) = A_EN.shape, B_BLN.shape
    A_NE = torch.empty(states, width, device=A_EN.device)
    B_BPN, C_BPN = torch.empty(2, batch, length, states, dtype=dtype, device=A_EN.device)
    B_BLN, C_BLN = in_rows(B_BLN), in_rows(C_BLN)
    blocks, of_A = -(-length // _ROWS), -(-width // _ROWS)
    launch(
        _prepare, (blocks + of_A, batch), (A_EN, B_BLN, C_BLN, A_NE, B_BPN, C_BPN),
        (width, real, length, given, blocks, *A_EN.stride(), *row_strides(B_BLN), *row_strides(C_BLN)),
        N=states, R=_ROWS, num_warps=2,
    )  # fmt: skip
    return A_NE, B_BPN, C_BPN


def add_groups(parts_BGLN: Tensor, total_BLN: Tensor) -> None:
    """Write the sum over groups, added up in float32; `total` has any strides, and no more states than the parts."""
    taken = parts_BGLN[..., : total_BLN.shape[-1]]
    if total_BLN.dtype in (parts_BGLN.dtype, torch.float32):
        torch.sum(taken, 1, dtype=total_BLN.dtype, out=total_BLN)
    else:
        total_BLN.copy_(taken.sum(1, dtype=torch.float32))
