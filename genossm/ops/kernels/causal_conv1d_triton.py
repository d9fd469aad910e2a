"""The short convolution in Triton: one pass over memory forward, one backward, SiLU included; time contiguous.

A thread holds 8 consecutive positions and their neighbours, and makes what the activation's derivative needs again.
Sums for the gradients of the taps are written in parts, tile by tile, and added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.backend import triton_interpreted
from genossm.ops.kernels import causal_conv1d_torch, causal_conv1d_walks
from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch
from genossm.ops.kernels.triton_parts import (
    empty_like,
    in_rows,
    join_runs,
    load_tile,
    row_strides,
    sigmoid,
    split_runs,
)

_MOST_TAPS = 8
# Neighbouring threads hold neighbouring positions, of which a row's stride says where they begin.
_jit = triton.jit(do_not_specialize=["tiles", "groups"])


@triton.jit
def _run(
    x, shift, side, end, position, step, inside, BD: tl.constexpr, G: tl.constexpr, HAS_SHIFT: tl.constexpr
):  # fmt: skip
    """Return the run of 8 positions before (side -1), at (0) or after (1) each run of a tile, 0 outside the row."""
    p = position + side * 8
    seen = inside[:, None] & (p >= 0)[None, :] & (p < end)[None, :]
    tile = load_tile(x, (side * 8 + tl.arange(0, G * 8))[None, :] * step, seen, False)
    if HAS_SHIFT:
        tile = tl.where(seen, tile + shift, 0.0)
    return split_runs(tile, BD, G)


@triton.jit
def _around(
    x, shift, end, position, step, inside, BD: tl.constexpr, G: tl.constexpr,
    HAS_SHIFT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Return 24 values: the runs before, at and after each run; one that is not asked for is never read."""
    here = _run(x, shift, 0, end, position, step, inside, BD, G, HAS_SHIFT)
    before = _run(x, shift, -1, end, position, step, inside, BD, G, HAS_SHIFT) if BEFORE else here
    after = _run(x, shift, 1, end, position, step, inside, BD, G, HAS_SHIFT) if AFTER else here
    return before + here + after


@triton.jit
def _taps(w, channel, inside, W: tl.constexpr):
    """Return taps by distance from the present position, [channels, 1] each."""
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(w + channel * W + W - 1 - j, inside, 0.0).to(tl.float32)[:, None],)
    return taps


@triton.jit
def _place(E, L, lengths, groups, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * BD + tl.arange(0, BD)
    end = tl.minimum(tl.load(lengths + row), L) if HAS_LENGTHS else L
    return row, tile, channel, tile.to(tl.int64) * T, end


@_jit
def _forward(
    x, w, bias, shift, lengths, y, E, L, groups, x_b, x_l, x_e, y_b, y_l, y_e,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    REVERSE: tl.constexpr, BD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row, _, channel, start, end = _place(E, L, lengths, groups, HAS_LENGTHS, BD, G * 8)
    inside = channel < E
    position = start + tl.arange(0, G * 8)
    wide = channel.to(tl.int64)
    at = x + row * x_b + wide * x_e + start * x_l
    own = tl.load(shift + channel, inside, 0.0).to(tl.float32)[:, None] if HAS_SHIFT else 0.0
    xs = _around(at, own, end, position, x_l, inside, BD, G, HAS_SHIFT, not REVERSE, REVERSE)
    taps = _taps(w, channel, inside, W)
    first = tl.load(bias + channel, inside, 0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
    out = ()
    for k in tl.static_range(8):
        value = first + taps[0] * xs[8 + k]
        for j in tl.static_range(1, W):
            value += taps[j] * xs[8 + k + j if REVERSE else 8 + k - j]
        out += (value * sigmoid(value) if SILU else value,)
    result = join_runs(out, BD, G)
    if HAS_LENGTHS:
        result = tl.where((position < end)[None, :], result, 0.0)
    to = (y + row * y_b + wide * y_e + start * y_l)[:, None] + tl.arange(0, G * 8)[None, :] * y_l
    tl.store(to, result.to(y.dtype.element_ty), inside[:, None] & (position < L)[None, :])


@_jit
def _backward(
    x, w, bias, shift, lengths, dy, dx, parts, E, L, tiles, groups, x_b, x_l, x_e, dy_b, dy_l, dy_e, dx_b, dx_l, dx_e,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    REVERSE: tl.constexpr, BD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row, tile, channel, start, end = _place(E, L, lengths, groups, HAS_LENGTHS, BD, G * 8)
    inside = channel < E
    position = start + tl.arange(0, G * 8)
    wide = channel.to(tl.int64)
    own = tl.load(shift + channel, inside, 0.0).to(tl.float32)[:, None] if HAS_SHIFT else 0.0
    xs = _around(
        x + row * x_b + wide * x_e + start * x_l, own, end, position, x_l, inside, BD, G, HAS_SHIFT,
        SILU or not REVERSE, SILU or REVERSE,
    )  # fmt: skip
    dys = _around(
        dy + row * dy_b + wide * dy_e + start * dy_l, 0.0, end, position, dy_l, inside, BD, G, False,
        REVERSE, not REVERSE,
    )  # fmt: skip
    taps = _taps(w, channel, inside, W)
    first = tl.load(bias + channel, inside, 0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
    # Gradients before the activation, at the run's positions and the W - 1 that the positions reach.
    inner = ()
    for p in tl.static_range(8 + W - 1):
        d = dys[8 + p - (W - 1) if REVERSE else 8 + p]
        if SILU:
            value = first + taps[0] * xs[8 + p - (W - 1) if REVERSE else 8 + p]
            for j in tl.static_range(1, W):
                value += taps[j] * xs[8 + p - (W - 1) + j if REVERSE else 8 + p - j]
            s = sigmoid(value)
            d = d * s * (1.0 + value * (1.0 - s))
        inner += (d,)
    result = ()
    for k in tl.static_range(8):
        value = taps[0] * inner[k + W - 1 if REVERSE else k]
        for j in tl.static_range(1, W):
            value += taps[j] * inner[k + W - 1 - j if REVERSE else k + j]
        result += (value,)
    to = (dx + row * dx_b + wide * dx_e + start * dx_l)[:, None] + tl.arange(0, G * 8)[None, :] * dx_l
    kept = inside[:, None] & (position < L)[None, :]
    grad = join_runs(result, BD, G)
    if HAS_LENGTHS:
        grad = tl.where((position < end)[None, :], grad, 0.0)
    tl.store(to, grad.to(dx.dtype.element_ty), kept)
    # Taps by channel, then the bias, then the shift: each has a piece of memory of its own.
    parts_at = parts + (row * tiles + tile) * E * (W + 2 if HAS_SHIFT else W + 1)
    if HAS_SHIFT:
        tl.store(
            parts_at + (W + 1) * E + channel, tl.sum(tl.where(kept & (position < end)[None, :], grad, 0.0), 1), inside
        )
    total = inner[W - 1 if REVERSE else 0]
    for k in tl.static_range(1, 8):
        total += inner[k + W - 1 if REVERSE else k]
    tl.store(parts_at + W * E + channel, tl.sum(total, 1), inside)
    for j in tl.static_range(W):
        total = inner[W - 1 if REVERSE else 0] * xs[8 + j if REVERSE else 8 - j]
        for k in tl.static_range(1, 8):
            total += inner[k + W - 1 if REVERSE else k] * xs[8 + k + j if REVERSE else 8 + k - j]
        tl.store(parts_at + channel * W + W - 1 - j, tl.sum(total, 1), inside)


def causal_conv1d(
    x_BLE: Tensor,
    w_EW: Tensor,
    bias_E: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state_BEW1: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve as `genossm.ops.causal_conv1d` describes."""
    stateful = initial_state_BEW1 is not None or return_state or resets_BL is not None
    if stateful or x_BLE.dtype == torch.float64 or w_EW.shape[1] > _MOST_TAPS:
        # States and documents are for streaming and packing, a small part of any run; torch's path has them.
        return causal_conv1d_torch.causal_conv1d(
            x_BLE,
            w_EW,
            bias_E,
            activation=activation,
            initial_state_BEW1=initial_state_BEW1,
            return_state=return_state,
            reverse=reverse,
            lengths_B=lengths_B,
            resets_BL=resets_BL,
        )
    return _CausalConv1d.apply(x_BLE, w_EW, bias_E, lengths_B, activation == "silu", reverse)


def _wide(x_BLE: Tensor) -> bool:
    """Tell whether channels are contiguous in memory, so that `causal_conv1d_walks` takes them."""
    return x_BLE.stride(2) == 1 and x_BLE.stride(1) != 1


@together
class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, w, bias, lengths, silu, reverse = given
        ctx.save_for_backward(x, w, bias, lengths)
        ctx.options = (silu, reverse)
        return convolve(x, w, bias, lengths, silu, reverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*convolve_backward(grads[0], *ctx.saved_tensors, *ctx.options), None, None, None)


def _plan(
    x: Tensor, w: Tensor, bias: Tensor | None, lengths: Tensor | None, silu: bool, reverse: bool
) -> tuple[Any, int, int]:
    """Return the kernels' flags, and a program's channels and positions: wide or long, as memory is."""
    flags = {
        "W": w.shape[1], "HAS_BIAS": bias is not None, "SILU": silu, "HAS_LENGTHS": lengths is not None,
        "REVERSE": reverse,
    }  # fmt: skip
    if not _wide(x):
        return flags | {"BD": 8, "G": 32, "num_warps": 4}, 8, 256
    # Four channels a thread, eight loads ahead: the fastest of ten forms (measured); short tiles where there are few.
    width = min(128, max(32, 1 << (x.shape[2] - 1).bit_length()))
    tile = 8 if triton_interpreted() else 64 if x.numel() >= 1 << 24 else 16
    return flags | {"BD": width, "U": 8, "num_warps": 1}, width, tile


def convolve(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
    shift: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Run the forward kernel; `shift`, for contiguous time alone, is added to the inputs of each channel first.

    The result is written to `y` where that is given.
    """
    batch, length, width = x.shape
    flags, channels, tile = _plan(x, w, bias, lengths, silu, reverse)
    groups = -(-width // channels)
    y = empty_like(x) if y is None else y
    grid = (groups * -(-length // tile), batch)
    if _wide(x):
        x = in_rows(x)
        numbers = (width, length, tile, groups, *row_strides(x), *row_strides(y))
        launch(causal_conv1d_walks.forward, grid, (x, w.contiguous(), bias, lengths, y), numbers, **flags)
    else:
        numbers = (width, length, groups, *x.stride(), *y.stride())
        flags["HAS_SHIFT"] = shift is not None
        launch(_forward, grid, (x, w.contiguous(), bias, shift, lengths, y), numbers, **flags)
    return y


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None = None,
    silu: bool = False,
    reverse: bool = False,
    dx: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of input, taps and bias; the first in `dx`, or with `add` (wide form) added to it."""
    batch, length, width = x.shape
    flags, channels, tile = _plan(x, w, bias, lengths, silu, reverse)
    if not _wide(x):
        dx, (dw, d_bias) = _gradients(dy, x, w, bias, None, lengths, dx, flags, channels, tile)
        return dx, dw.view_as(w).to(w.dtype), None if bias is None else d_bias.to(bias.dtype)
    groups, tiles = -(-width // channels), -(-length // tile)
    dx = empty_like(x) if dx is None else dx
    parts = torch.empty(batch, tiles, flags["W"] + 1, width, device=x.device)
    x, dy = in_rows(x), in_rows(dy)
    launch(
        causal_conv1d_walks.backward, (groups * tiles, batch), (x, w.contiguous(), bias, lengths, dy, dx, parts),
        (width, length, tile, tiles, groups, *row_strides(x), *row_strides(dy), *row_strides(dx)), ADD=add, **flags,
    )  # fmt: skip
    total = parts.sum((0, 1)).T
    return dx, total[:, :-1].to(w.dtype), None if bias is None else total[:, -1].to(bias.dtype)


def convolve_shifted_backward(
    dy: Tensor, x: Tensor, w: Tensor, bias: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, taps, bias and shift."""
    flags, channels, tile = _plan(x, w, bias, None, False, False)
    dx, (dw, d_bias, d_shift) = _gradients(dy, x, w, bias, shift, None, None, flags, channels, tile)
    return dx, dw.view_as(w).to(w.dtype), d_bias.to(bias.dtype), d_shift.to(shift.dtype)


def _gradients(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    lengths: Tensor | None,
    dx: Tensor | None,
    flags: dict[str, Any],
    channels: int,
    tile: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the kernel of contiguous time; return the input's gradient, and those of w (flat), bias and shift, if any."""
    batch, length, width = x.shape
    groups, tiles = -(-width // channels), -(-length // tile)
    dx = empty_like(x) if dx is None else dx
    sizes = [width * flags["W"], width] + ([] if shift is None else [width])
    parts = torch.empty(batch, tiles, sum(sizes), device=x.device)
    launch(
        _backward, (groups * tiles, batch), (x, w.contiguous(), bias, shift, lengths, dy, dx, parts),
        (width, length, tiles, groups, *x.stride(), *dy.stride(), *dx.stride()), HAS_SHIFT=shift is not None, **flags,
    )  # fmt: skip
    return dx, parts.sum((0, 1)).split(sizes)
