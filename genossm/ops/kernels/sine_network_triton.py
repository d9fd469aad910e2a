"""The network of sines in Triton: one pass over memory forward, one a layer backward, which makes the layers again.

Products are exact to float32 (three of TF32 each), as the arguments of the sines must be. Sums over positions for the
gradients of the weights are written in parts, program by program, and added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch, pieces, power_of_2
from genossm.ops.kernels.triton_parts import cut, of_length
from genossm.ops.rows import whole_length

_T = 64
_WARPS = 4
_PROGRAMS = 264
"""Programs of the backward kernel, two for each multiprocessor of a large GPU; each adds up its positions' parts."""


_PI_INVERSE = tl.constexpr(0.3183098861837907)
# Three addends of pi, of which the first two have so few digits that their multiples are exact.
_PI_1, _PI_2, _PI_3 = tl.constexpr(3.140625), tl.constexpr(9.67502593994140625e-4), tl.constexpr(1.509957990978376e-7)


@triton.jit
def _sine(x, QUARTER: tl.constexpr):
    """Return sin x where QUARTER is 0, cos x where it is 0.5; exact to float32 for |x| up to some thousands.

    Triton's own takes ten times the instructions. x is brought within pi / 2 of a zero of the result; there the first
    seven terms of the series are enough.
    """
    turns = tl.floor(x * _PI_INVERSE + (0.5 - QUARTER))
    at = turns + QUARTER
    r = ((x - at * _PI_1) - at * _PI_2) - at * _PI_3
    s = r * r
    series = 1.0 + s * (
        -1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880 + s * (-1 / 39916800 + s / 6227020800))))
    )
    odd = turns - 2.0 * tl.floor(turns * 0.5)
    # Beyond a zero of the cosine it falls, where the sine rises.
    falls = 1.0 - odd if QUARTER > 0 else odd
    return (1.0 - 2.0 * falls) * r * series


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _matrix(w, row, column, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr):
    """Load a matrix (F, C), padded with zeros to (BF, BC)."""
    if F == BF and C == BC:
        return tl.load(w + row[:, None] * C + column[None, :])
    seen = (row < F)[:, None] & (column < C)[None, :]
    return tl.load(w + row[:, None] * C + column[None, :], seen, 0.0)


@triton.jit
def _features(z, feature, t, L, E):
    """Load the features of a tile of positions, padded with zeros."""
    return tl.load(z + feature.to(tl.int64)[:, None] * L + t[None, :], (feature < E)[:, None] & (t < L)[None, :], 0.0)


@triton.jit
def _argument(
    w, h, bias, i, row, F: tl.constexpr, C: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Return what a layer takes the sine of, before its frequency: [width, positions]."""
    first = tl.load(bias + i * F + row, row < F, 0.0)
    return _product(_matrix(w, row, tl.arange(0, BC), F, C, BF, BC), h) + first[:, None]


@triton.jit
def _forward(
    z, first, inner, bias, freq, out, L, F: tl.constexpr, E: tl.constexpr,
    LAYERS: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BF)
    t = tl.program_id(0) * T + tl.arange(0, T)
    frequency = tl.load(freq + row, row < F, 0.0)[:, None]
    h = _features(z, tl.arange(0, BE), t, L, E)
    h = _sine(frequency * _argument(first, h, bias, 0, row, F, E, BF, BE), 0.0)
    for i in range(1, LAYERS):
        h = _sine(frequency * _argument(inner + (i - 1) * F * F, h, bias, i, row, F, F, BF, BF), 0.0)
    at = row.to(tl.int64)[:, None] * L + t[None, :]
    tl.store(out + at, h, (row < F)[:, None] & (t < L)[None, :])


@triton.jit
def _backward(
    z, first, inner, bias, freq, grad, d_before, d_w, d_bias, d_freq, L, still, step, F: tl.constexpr, E: tl.constexpr,
    LAYER: tl.constexpr, HAS_BEFORE: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Pass the gradient of layer LAYER to its weights, and where HAS_BEFORE to what it is made of."""
    row = tl.arange(0, BF)
    feature = tl.arange(0, BE)
    inside = row < F
    frequency = tl.load(freq + row, inside, 0.0)[:, None]
    C: tl.constexpr = BF if LAYER > 0 else BE
    column = tl.arange(0, C)
    columns: tl.constexpr = F if LAYER > 0 else E
    w = first if LAYER == 0 else inner + (LAYER - 1) * F * F
    d_frequency = tl.zeros([BF], tl.float32)
    d_shift = tl.zeros([BF], tl.float32)
    d_matrix = tl.zeros([BF, C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(L, T), tl.num_programs(0)):
        t = block * T + tl.arange(0, T)
        # `still` is 0, which the compiler can't know: matrices that it loaded once for all would not fit the registers.
        move = block * still
        h = _features(z, feature, t, L, E)
        a = _argument(first + move, h, bias, 0, row, F, E, BF, BE)
        for i in tl.static_range(LAYER):
            h = _sine(frequency * a, 0.0)
            a = _argument(inner + i * F * F + move, h, bias, i + 1, row, F, F, BF, BF)
        at = row.to(tl.int64)[:, None] * L + t[None, :]
        d = tl.load(grad + at, inside[:, None] & (t < L)[None, :], 0.0) * _sine(frequency * a, 0.5)
        d_frequency += tl.sum(d * a, 1)
        d = d * frequency
        d_shift += tl.sum(d, 1)
        d_matrix += _product(d, tl.trans(h))
        if HAS_BEFORE:
            before = _product(tl.trans(_matrix(w + move, row, column, F, columns, BF, C)), d)
            to = column.to(tl.int64)[:, None] * L + t[None, :]
            tl.store(d_before + to, before, (column < columns)[:, None] & (t < L)[None, :])
    part = tl.program_id(0)
    tl.store(d_freq + part * step + row, d_frequency, inside)
    tl.store(d_bias + part * step + row, d_shift, inside)
    at = part * step + row[:, None] * columns + column[None, :]
    tl.store(d_w + at, d_matrix, inside[:, None] & (column < columns)[None, :])


@together
class SineNetwork(torch.autograd.Function):
    """z, freq, the number of layers, their weights, their biases -> h; tensors as in `genossm.ops.sine_network`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        z, freq, layers, *rest = given
        first, inner, bias = _stacked(rest[:layers], rest[layers:])
        given = z.shape[1]
        z, freq = of_length(z, whole_length(given)).contiguous(), freq.contiguous()
        (features, length), width = z.shape, freq.shape[0]
        out = torch.empty(width, length, device=z.device)
        launch(
            _forward, (pieces(length, _T),), (z, first, inner, bias, freq, out), (length,), F=width, E=features,
            LAYERS=layers, BF=_padded(width), BE=_padded(features), T=_T, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(z, freq, first, inner, bias)
        ctx.given = given
        return cut(out, given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, freq, first, inner, bias = ctx.saved_tensors
        (features, length), (layers, width) = z.shape, bias.shape
        programs = min(_PROGRAMS, pieces(length, _T))
        dh = of_length(grads[0], length).contiguous()
        # What a program adds up of all layers lies side by side, so that one sum adds up all programs.
        sizes = [first.numel(), *[width * width] * (layers - 1), *[width] * (2 * layers)]
        parts_PX = torch.empty(programs, sum(sizes), device=z.device)
        parts = parts_PX.split(sizes, dim=1)
        for layer in reversed(range(layers)):
            before = torch.empty_like(dh if layer > 0 else z) if layer > 0 or ctx.needs_input_grad[0] else None
            launch(
                _backward, (programs,), (z, first, inner, bias, freq, dh, before, *parts[layer::layers]),
                (length, 0, sum(sizes)), F=width, E=features, LAYER=layer, HAS_BEFORE=before is not None,
                BF=_padded(width), BE=_padded(features), T=_T // 2, num_warps=_WARPS, num_stages=1,
            )  # fmt: skip
            dh = before
        total_X = parts_PX.sum(0)
        found = total_X.split(sizes)
        weights = [d.view(width, -1) for d in found[:layers]]
        d_freq = total_X[-layers * width :].view(layers, width).sum(0)
        dz = None if dh is None else cut(dh, ctx.given)
        return dz, d_freq, None, *weights, *found[layers : 2 * layers]


def _stacked(weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first weight, those behind it and the biases, each in one piece of memory."""
    inner = torch.stack(weights[1:]) if len(weights) > 1 else weights[0].new_empty(0, *[len(biases[0])] * 2)
    return weights[0].contiguous(), inner, torch.stack(biases)


def _padded(width: int) -> int:
    """Return the width of the tiles: products take 16 rows at least."""
    return max(16, power_of_2(width))
