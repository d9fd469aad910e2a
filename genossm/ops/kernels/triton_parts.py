"""Pieces that the Triton kernels share: tiles of [rows, positions] whose threads hold 8 consecutive positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from genossm.ops.rows import whole_length

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|): exact to float32 on both sides."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    # The polynomial of log(1 + e) / e whose largest relative error on [0, 1] is least, 3e-8; it needs no quotient.
    p = 0.191060052 + e * (-0.136632428 + e * (0.0782259107 + e * (-0.0295052137 + e * 0.00523268804)))
    p = 0.99999994 + e * (-0.499994934 + e * (0.333190978 + e * (-0.24842982 + e * p)))
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def softplus_slope(x):
    """Return the derivative of `softplus`, from the exponential that it takes."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def load_tile(rows, offsets, seen, EVEN: tl.constexpr):
    """Load [rows, positions] as float32, 0 where not seen."""
    if EVEN:
        return tl.load(rows[:, None] + offsets).to(tl.float32)
    return tl.load(rows[:, None] + offsets, seen, 0.0).to(tl.float32)


@triton.jit
def split_runs(x, BD: tl.constexpr, G: tl.constexpr):
    """Split [BD, G * 8] into 8 tensors [BD, G]: position k of every run of 8. It moves nothing between threads."""
    even, odd = tl.split(tl.reshape(x, [BD, G, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return (x0, x1, x2, x3, x4, x5, x6, x7)


@triton.jit
def join_runs(x, BD: tl.constexpr, G: tl.constexpr):
    """Undo `split_runs`."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), [BD, G * 8])


@triton.jit
def add_by_run(x, G: tl.constexpr):
    """Join 8 tensors [G] into [G * 8]."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), [G * 8])


def empty_like(x_BLE: Tensor) -> Tensor:
    """Return an empty tensor with time contiguous in memory, or with channels contiguous where those of x are."""
    batch, length, width = x_BLE.shape
    if x_BLE.stride(2) == 1 and x_BLE.stride(1) != 1:
        return torch.empty(batch, length, width, dtype=x_BLE.dtype, device=x_BLE.device)
    return torch.empty(batch, width, length, dtype=x_BLE.dtype, device=x_BLE.device).transpose(1, 2)


def in_rows(x_BLE: Tensor) -> Tensor:
    """Return a tensor whose rows begin a whole number of positions apart: itself but for a few views, or a copy."""
    row, position, _ = x_BLE.stride()
    whole = len(x_BLE) == 1 or row == 0 or (position > 0 and row % position == 0)
    return x_BLE if whole else x_BLE.contiguous()


def row_strides(x_BLE: Tensor) -> tuple[int, int, int]:
    """Return how far rows are apart, in positions, and the strides of positions and channels."""
    row, position, channel = x_BLE.stride()
    return row // position if position else 0, position, channel


def whole(x_BLE: Tensor) -> Tensor:
    """Return a tensor with zeros behind its rows up to a `whole_length`: itself where it has one."""
    missing = whole_length(x_BLE.shape[1]) - x_BLE.shape[1]
    if missing == 0:
        return x_BLE
    if x_BLE.stride(1) == 1:
        return pad(x_BLE.transpose(1, 2), (0, missing)).transpose(1, 2)
    return pad(x_BLE, (0, 0, 0, missing))


def of_length(x_EL: Tensor, length: int) -> Tensor:
    """Return so many columns of a matrix, zeros behind those that it has."""
    return cut(x_EL, length) if length <= x_EL.shape[1] else pad(x_EL, (0, length - x_EL.shape[1]))


def cut(x_BL: Tensor, length: int) -> Tensor:
    """Return the first positions along the second axis; itself, at no cost, where it has no more."""
    return x_BL if x_BL.shape[1] == length else x_BL[:, :length]
