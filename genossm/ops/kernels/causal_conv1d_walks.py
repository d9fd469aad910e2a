"""The short convolution where channels are contiguous in memory: a warp walks many channels through a tile of time.

Each input is read once, 16 bytes a thread; the taps' window stays in registers. Backward walks the other way and makes
what the activation's derivative needs again. Sums for the gradients of the taps are written in parts, tile by tile.
"""

import triton
import triton.language as tl

from genossm.ops.kernels.triton_parts import sigmoid

# A length that 16 does not divide needs no code of its own: neighbouring threads hold neighbouring channels.
# Nor does a row's beginning: it is told in positions, so that a stride of channels that 16 divides still aligns it.
_walk = triton.jit(do_not_specialize=["L", "T", "tiles", "groups", "x_rows", "y_rows", "dy_rows", "dx_rows"])


@triton.jit
def _place(lengths, E, L, T, groups, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * BD + tl.arange(0, BD)
    inside = channel < E
    end = tl.minimum(tl.load(lengths + row), L) if HAS_LENGTHS else L
    return row, tile, channel, inside, tile.to(tl.int64) * T, tl.where(inside, end, 0), tl.where(inside, L, 0)


@triton.jit
def _at(rows, p, start, ends, step):
    """Load position p of a tile for each channel; 0 outside the row."""
    return tl.load(rows + p * step, (start + p < ends) & (start + p + tl.zeros_like(ends) >= 0), 0.0).to(tl.float32)


@triton.jit
def _taps(w, channel, inside, W: tl.constexpr):
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(w + channel * W + W - 1 - j, inside, 0.0).to(tl.float32),)
    return taps


@triton.jit
def _shifted(new, window, W: tl.constexpr):
    """Put a value before a window and drop its last."""
    values = (new,)
    for j in tl.static_range(W - 1):
        values += (window[j],)
    return values


@triton.jit
def _next(window, new, W: tl.constexpr):
    """Drop a window's first value and append one."""
    values = ()
    for j in tl.static_range(1, W):
        values += (window[j],)
    values += (new,)
    return values


@_walk
def forward(
    x, w, bias, lengths, y, E, L, T, groups, x_rows, x_l, x_e, y_rows, y_l, y_e,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Convolve; a window holds the W - 1 inputs before a position, nearest first."""
    row, _, channel, inside, start, ends, lasts = _place(lengths, E, L, T, groups, HAS_LENGTHS, BD)
    wide = channel.to(tl.int64)
    x_at = x + (row * x_rows + start) * x_l + wide * x_e
    y_at = y + (row * y_rows + start) * y_l + wide * y_e
    taps = _taps(w, channel, inside, W)
    first = tl.load(bias + channel, inside, 0.0).to(tl.float32) if HAS_BIAS else 0.0
    window = ()
    for j in tl.static_range(W):
        window += (_at(x_at, T + j if REVERSE else -1 - j, start, ends, x_l),)
    for i in range(0, T, U):
        news = ()
        for k in tl.static_range(U):
            news += (_at(x_at, T - 1 - i - k if REVERSE else i + k, start, ends, x_l),)
        for k in tl.static_range(U):
            t = T - 1 - i - k if REVERSE else i + k
            value = first + taps[0] * news[k]
            for j in tl.static_range(1, W):
                value += taps[j] * window[j - 1]
            window = _shifted(news[k], window, W)
            value = value * sigmoid(value) if SILU else value
            value = tl.where(start + t < ends, value, 0.0) if HAS_LENGTHS else value
            tl.store(y_at + t * y_l, value.to(y.dtype.element_ty), start + t < lasts)


@triton.jit
def _inner(d, window, taps, first, W: tl.constexpr, SILU: tl.constexpr):
    """Pass a gradient through the activation; the window's first value is the input at its position."""
    if SILU:
        value = first + taps[0] * window[0]
        for j in tl.static_range(1, W):
            value += taps[j] * window[j]
        s = sigmoid(value)
        d = d * s * (1.0 + value * (1.0 - s))
    return d


@_walk
def backward(
    x, w, bias, lengths, dy, dx, parts,
    E, L, T, tiles, groups, x_rows, x_l, x_e, dy_rows, dy_l, dy_e, dx_rows, dx_l, dx_e,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    ADD: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Write the input's gradient (added to what is there where ADD) and the tile's part of those of taps and bias."""
    row, tile, channel, inside, start, ends, lasts = _place(lengths, E, L, T, groups, HAS_LENGTHS, BD)
    wide = channel.to(tl.int64)
    x_at = x + (row * x_rows + start) * x_l + wide * x_e
    dy_at = dy + (row * dy_rows + start) * dy_l + wide * dy_e
    dx_at = dx + (row * dx_rows + start) * dx_l + wide * dx_e
    taps = _taps(w, channel, inside, W)
    first = tl.load(bias + channel, inside, 0.0).to(tl.float32) if HAS_BIAS else 0.0
    # Steps are counted from W - 1 positions behind the tile, seen from the walk's end; those give gradients alone.
    window = ()
    inner = ()
    totals = ()
    for j in tl.static_range(W):
        window += (_at(x_at, 1 + j - W if REVERSE else T + W - 2 - j, start, ends, x_l),)
        inner += (tl.zeros([BD], tl.float32),)
        totals += (tl.zeros([BD], tl.float32),)
    for s in tl.static_range(W - 1):
        p = s + 1 - W if REVERSE else T + W - 2 - s
        inner = _shifted(_inner(_at(dy_at, p, start, ends, dy_l), window, taps, first, W, SILU), inner, W)
        window = _next(window, _at(x_at, s + 1 if REVERSE else T - 2 - s, start, ends, x_l), W)
    total = tl.zeros([BD], tl.float32)
    for i in range(0, T, U):
        news = ()
        grads = ()
        others = ()
        for k in tl.static_range(U):
            p = i + k if REVERSE else T - 1 - i - k
            # The window moves after the step, to the input W positions on.
            news += (_at(x_at, p + W if REVERSE else p - W, start, ends, x_l),)
            grads += (_at(dy_at, p, start, ends, dy_l),)
            others += (_at(dx_at, p, start, lasts, dx_l) if ADD else 0.0,)
        for k in tl.static_range(U):
            p = i + k if REVERSE else T - 1 - i - k
            d = _inner(grads[k], window, taps, first, W, SILU)
            inner = _shifted(d, inner, W)
            result = taps[0] * inner[0]
            for j in tl.static_range(1, W):
                result += taps[j] * inner[j]
            more = ()
            for j in tl.static_range(W):
                more += (totals[j] + d * window[j],)
            totals = more
            total += d
            window = _next(window, news[k], W)
            result = tl.where(start + p < ends, result, 0.0) if HAS_LENGTHS else result
            result = result + others[k] if ADD else result
            tl.store(dx_at + p * dx_l, result.to(dx.dtype.element_ty), start + p < lasts)
    parts_at = parts + ((row * tiles + tile) * (W + 1)) * E + channel
    tl.store(parts_at + W * E, total, inside)
    for j in tl.static_range(W):
        tl.store(parts_at + (W - 1 - j) * E, totals[j], inside)
