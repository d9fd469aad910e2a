"""The machine code of the CPU kernels: float32, channels last, compiled by numba when first called.

All of it stands in one file because numba renews a cached function only when the function's own file changes. What
makes it fast (measured): inner loops run over a whole block of channels, so that the check for overlapping arrays that
the compiler puts before each pays; exp is a polynomial, which vectorises without a vendor's library; registers are as
wide as the processor has them; the backward pass makes the states of one time chunk again, in cache. Kernels release
the GIL and work on every `jobs`-th item (a row and a block of channels), so that plain threads can share them.

Shapes are (B, L, E) for what goes along the sequence, states first elsewhere: A_NE, h_BNE. A flag says where an
optional array holds nothing. `lens_B` bounds each row; `reverse` walks it from its last real position. Types are
numba's to infer, hence `no_type_check`.
"""

import logging
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import config as numba_config
from numba import njit
from numba.core.codegen import get_host_cpu_features

logger = logging.getLogger(__name__)

CHUNK = 32
"""Positions between two kept states; a chunk's states and decays stay in the second-level cache."""
BLOCK = 256
"""Channels of a block."""

_f, _i = np.float32, np.int32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504088896341), _f(0.693359375), _f(-2.12194440e-4)
_LN2 = _f(0.69314718055994531)
_P4, _P3, _P2, _P1 = _f(1.33005e-3), _f(9.66971e-3), _f(5.550559e-2), _f(2.4022282e-1)
_E5, _E4, _E3 = _f(1.9875691500e-4), _f(1.3981999507e-3), _f(8.3334519073e-3)
_E2, _E1, _E0 = _f(4.1665795894e-2), _f(1.6666665459e-1), _f(5.0000001201e-1)
_L3, _L5, _L7, _L9, _L11, _L13 = (_f(1 / k) for k in (3, 5, 7, 9, 11, 13))
_ZERO, _HALF, _ONE, _TWO, _LOWEST, _LOWEST2 = _f(0), _f(0.5), _f(1), _f(2), _f(-87), _f(-126)

# Not "fast" as a whole: NaN must come out where NaN goes in.
_OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "arcp", "nsz", "afn"},
    "error_model": "numpy",
    "boundscheck": False,
}


def _take_widest_registers() -> None:
    """Have loops use 512-bit registers from Intel's Ice Lake on, where the compiler itself would take 256 bits.

    Measured: 1.7 times as fast a scan. Older processors slow their clocks for them. What a user has set is kept, and
    what numba compiled before in this process stays as it is.
    """
    # Its attributes are made at run time.
    config: Any = numba_config
    features: str = get_host_cpu_features()
    if config.CPU_FEATURES is None and "+avx512vbmi2" in features.split(","):
        config.CPU_FEATURES = f"{features},-prefer-256-bit"


_take_widest_registers()


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel at its first call and keep it on disk, or in memory alone where no folder can be written."""
    try:
        return njit(nogil=True, cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        logger.warning("%s is compiled anew in every process: %s", function.__name__, error)
        return njit(nogil=True, **_OPTIONS)(function)


_inlined: Any = njit(inline="always", **_OPTIONS)


@_inlined
@no_type_check
def _exp(x):
    """Return exp(x) for x <= 0 (to 2^-23; below -87 it is exp(-87)): 2^k times a polynomial (Cephes, expf)."""
    x = _LOWEST if x < _LOWEST else x
    k = _i(x * _LOG2E - _HALF)
    whole = _f(k)
    r = x - whole * _LN2_HIGH
    r = r - whole * _LN2_LOW
    q = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _E0
    q = q * r * r + r + _ONE
    power = _i((k + _i(127)) << _i(23))
    return q * power.view(np.float32)


@_inlined
@no_type_check
def _exp2(x):
    """Return 2^x for x <= 0 (to 2^-22; below -126 it is 2^-126).

    A decay near 1 is raised to high powers, so that 1 - 2^x must be as exact as 2^x: the polynomial's first two
    coefficients are those of the series, the others its best fit (least greatest error) on [-1/2, 1/2].
    """
    x = _LOWEST2 if x < _LOWEST2 else x
    k = _i(x - _HALF)
    r = x - _f(k)
    q = _f(((((_P4 * r + _P3) * r + _P2) * r + _P1) * r + _LN2) * r + _ONE)
    return _i(q.view(np.int32) + _i(k << _i(23))).view(np.float32)


@_inlined
@no_type_check
def _softplus(x):
    """Return log(1 + exp(x)): max(x, 0) + log1p(e) with e = exp(-|x|), the latter by its series in e / (2 + e)."""
    e = _exp(-abs(x))
    s = e / (_TWO + e)
    s2 = s * s
    series = _ONE + s2 * (_L3 + s2 * (_L5 + s2 * (_L7 + s2 * (_L9 + s2 * (_L11 + s2 * _L13)))))
    return (_ZERO if x < _ZERO else x) + _TWO * s * series


@_inlined
@no_type_check
def _sigmoid(x):
    e = _exp(-abs(x))
    r = _ONE / (_ONE + e)
    return e * r if x < _ZERO else r


@compiled
@no_type_check
def scan_forward(
    u, dt, z, B, C, A_NE, D, bias, lens_B, drop_BL, has_z, has_drop, reverse, save, h0, y, kept, last, job, jobs
):
    """Run the selective scan; `save` keeps the state before every CHUNK-th step in kept_BKNE."""
    batch, _, width = u.shape
    states = A_NE.shape[0]
    blocks = (width + BLOCK - 1) // BLOCK
    step = np.empty(BLOCK, _f)
    entering = np.empty(BLOCK, _f)
    out = np.empty(BLOCK, _f)
    h = np.empty((states, BLOCK), _f)
    rate = np.empty((states, BLOCK), _f)
    for item in range(job, batch * blocks, jobs):
        b, d0 = item // blocks, (item % blocks) * BLOCK
        w = min(BLOCK, width - d0)
        d1 = d0 + w
        # Slices count from 0: an index like d0 + j might be below it for all that the compiler knows.
        bias_w, D_w = bias[d0:d1], D[d0:d1]
        for n in range(states):
            for j in range(w):
                rate[n, j] = A_NE[n, d0 + j] * _LOG2E
                h[n, j] = h0[b, n, d0 + j]
        for s in range(lens_B[b]):
            t = lens_B[b] - 1 - s if reverse else s
            if save and s % CHUNK == 0:
                for n in range(states):
                    for j in range(w):
                        kept[b, s // CHUNK, n, d0 + j] = h[n, j]
            if has_drop and drop_BL[b, t]:
                h[:] = _ZERO
            u_w, dt_w = u[b, t, d0:d1], dt[b, t, d0:d1]
            for j in range(w):
                d = _softplus(dt_w[j] + bias_w[j])
                x = u_w[j]
                step[j] = d
                entering[j] = d * x
                out[j] = D_w[j] * x
            for n in range(states):
                bb = B[b, t, n]
                cc = C[b, t, n]
                for j in range(w):
                    v = _exp2(step[j] * rate[n, j]) * h[n, j] + entering[j] * bb
                    h[n, j] = v
                    out[j] += cc * v
            y_w = y[b, t, d0:d1]
            if has_z:
                z_w = z[b, t, d0:d1]
                for j in range(w):
                    gate = z_w[j]
                    y_w[j] = out[j] * gate * _sigmoid(gate)
            else:
                for j in range(w):
                    y_w[j] = out[j]
        for n in range(states):
            for j in range(w):
                last[b, n, d0 + j] = h[n, j]


@compiled
@no_type_check
def scan_backward(
    u, dt, z, B, C, A_NE, D, bias, lens_B, drop_BL, has_z, has_drop, reverse, kept, dout, dlast,
    du, ddt, dz, dB, dC, dA, dD, dbias, dh0, job, jobs,
):  # fmt: skip
    """Run the scan's backward pass: dB and dC hold one part a block of channels, dA, dD and dbias one a job."""
    batch, _, width = u.shape
    states = A_NE.shape[0]
    blocks = (width + BLOCK - 1) // BLOCK
    # State i + 1 is that after step i of the chunk.
    h = np.empty((CHUNK + 1, states, BLOCK), _f)
    decay = np.empty((CHUNK, states, BLOCK), _f)
    step = np.empty((CHUNK, BLOCK), _f)
    slope = np.empty((CHUNK, BLOCK), _f)
    out = np.empty((CHUNK, BLOCK), _f)
    entering = np.empty(BLOCK, _f)
    dy = np.empty(BLOCK, _f)
    dentering = np.empty(BLOCK, _f)
    dstep = np.empty(BLOCK, _f)
    g = np.empty((states, BLOCK), _f)
    drate = np.empty((states, BLOCK), _f)
    rate = np.empty((states, BLOCK), _f)
    for item in range(job, batch * blocks, jobs):
        b, block = item // blocks, item % blocks
        d0 = block * BLOCK
        w = min(BLOCK, width - d0)
        d1 = d0 + w
        bias_w, D_w, dbias_w, dD_w = bias[d0:d1], D[d0:d1], dbias[job, d0:d1], dD[job, d0:d1]
        length = lens_B[b]
        for n in range(states):
            for j in range(w):
                rate[n, j] = A_NE[n, d0 + j] * _LOG2E
                g[n, j] = dlast[b, n, d0 + j]
                drate[n, j] = _ZERO
        for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
            s0 = chunk * CHUNK
            s1 = min(length, s0 + CHUNK)
            for n in range(states):
                for j in range(w):
                    h[0, n, j] = kept[b, chunk, n, d0 + j]
            for s in range(s0, s1):
                i = s - s0
                t = length - 1 - s if reverse else s
                stays = _ZERO if has_drop and drop_BL[b, t] else _ONE
                u_w, dt_w = u[b, t, d0:d1], dt[b, t, d0:d1]
                step_w, slope_w, out_w = step[i], slope[i], out[i]
                for j in range(w):
                    raw = dt_w[j] + bias_w[j]
                    d = _softplus(raw)
                    x = u_w[j]
                    slope_w[j] = _sigmoid(raw)
                    step_w[j] = d
                    entering[j] = d * x
                    out_w[j] = D_w[j] * x
                for n in range(states):
                    bb = B[b, t, n]
                    cc = C[b, t, n]
                    for j in range(w):
                        a = _exp2(step_w[j] * rate[n, j]) * stays
                        decay[i, n, j] = a
                        v = a * h[i, n, j] + entering[j] * bb
                        h[i + 1, n, j] = v
                        out_w[j] += cc * v
            for s in range(s1 - 1, s0 - 1, -1):
                i = s - s0
                t = length - 1 - s if reverse else s
                u_w, dout_w = u[b, t, d0:d1], dout[b, t, d0:d1]
                step_w, slope_w, out_w = step[i], slope[i], out[i]
                if has_z:
                    z_w, dz_w = z[b, t, d0:d1], dz[b, t, d0:d1]
                    for j in range(w):
                        gate = z_w[j]
                        sg = _sigmoid(gate)
                        do = dout_w[j]
                        dz_w[j] = do * out_w[j] * sg * (_ONE + gate * (_ONE - sg))
                        dy[j] = do * gate * sg
                else:
                    for j in range(w):
                        dy[j] = dout_w[j]
                for j in range(w):
                    entering[j] = step_w[j] * u_w[j]
                    dentering[j] = _ZERO
                    dstep[j] = _ZERO
                    dD_w[j] += dy[j] * u_w[j]
                for n in range(states):
                    bb = B[b, t, n]
                    cc = C[b, t, n]
                    sum_c = _ZERO
                    sum_b = _ZERO
                    for j in range(w):
                        v = g[n, j] + cc * dy[j]
                        sum_c += dy[j] * h[i + 1, n, j]
                        sum_b += v * entering[j]
                        dentering[j] += v * bb
                        back = v * decay[i, n, j]
                        q = back * h[i, n, j]
                        dstep[j] += q * rate[n, j]
                        drate[n, j] += q * step_w[j]
                        g[n, j] = back
                    dC[block, b, t, n] = sum_c
                    dB[block, b, t, n] = sum_b
                du_w, ddt_w = du[b, t, d0:d1], ddt[b, t, d0:d1]
                for j in range(w):
                    du_w[j] = D_w[j] * dy[j] + step_w[j] * dentering[j]
                    r = (u_w[j] * dentering[j] + _LN2 * dstep[j]) * slope_w[j]
                    ddt_w[j] = r
                    dbias_w[j] += r
        for n in range(states):
            for j in range(w):
                dA[job, n, d0 + j] += drate[n, j]
                dh0[b, n, d0 + j] = g[n, j]


@compiled
@no_type_check
def conv_forward(x, w_WE, bias, lens_B, seen_BL, h0_BWE, has_seen, silu, reverse, y, job, jobs):
    """Run the short convolution; seen_BL is the first step whose input each step sees (below 0: the row's state)."""
    batch, length, width = x.shape
    taps = w_WE.shape[0]
    acc = np.empty(width, _f)
    pieces = (length + CHUNK - 1) // CHUNK
    for item in range(job, batch * pieces, jobs):
        b, s0 = item // pieces, (item % pieces) * CHUNK
        for s in range(s0, min(lens_B[b], s0 + CHUNK)):
            t = lens_B[b] - 1 - s if reverse else s
            back = 1 if reverse else -1
            first = seen_BL[b, t] if has_seen else 1 - taps
            if taps == 4 and s >= 3 and first <= s - 3:
                t1, t2, t3 = t + back, t + 2 * back, t + 3 * back
                for j in range(width):
                    v = bias[j] + w_WE[3, j] * x[b, t, j] + w_WE[2, j] * x[b, t1, j]
                    acc[j] = v + w_WE[1, j] * x[b, t2, j] + w_WE[0, j] * x[b, t3, j]
            else:
                for j in range(width):
                    acc[j] = bias[j]
                for k in range(taps):
                    if s - k < first:
                        continue
                    if s - k >= 0:
                        for j in range(width):
                            acc[j] += w_WE[taps - 1 - k, j] * x[b, t + k * back, j]
                    else:
                        for j in range(width):
                            acc[j] += w_WE[taps - 1 - k, j] * h0_BWE[b, taps - 1 + s - k, j]
            if silu:
                for j in range(width):
                    y[b, t, j] = acc[j] * _sigmoid(acc[j])
            else:
                for j in range(width):
                    y[b, t, j] = acc[j]


@compiled
@no_type_check
def conv_backward(
    x, w_WE, bias, lens_B, seen_BL, h0_BWE, has_seen, silu, reverse, dout, dx, dw, dbias, dh0_BWE, job, jobs
):
    """Run the convolution's backward pass; dw and dbias hold one part a job.

    The gradients of the last W steps wait in a ring, until all that read an input are there.
    """
    batch, _, width = x.shape
    taps = w_WE.shape[0]
    blocks = (width + BLOCK - 1) // BLOCK
    ring = np.empty((taps, BLOCK), _f)
    firsts = np.empty(taps, np.int64)
    acc = np.empty(BLOCK, _f)
    w_sum = np.empty((taps, BLOCK), _f)
    for item in range(job, batch * blocks, jobs):
        b, d0 = item // blocks, (item % blocks) * BLOCK
        w = min(BLOCK, width - d0)
        d1 = d0 + w
        # Slices count from 0: an index like d0 + j might be below it for all that the compiler knows.
        bias_w, dbias_w = bias[d0:d1], dbias[job, d0:d1]
        length = lens_B[b]
        back = 1 if reverse else -1
        ring[:] = _ZERO
        w_sum[:] = _ZERO
        firsts[:] = 1 - taps
        for s in range(length + taps - 1):
            t = length - 1 - s if reverse else s
            g = ring[s % taps]
            first = 1 - taps
            if s < length:
                first = seen_BL[b, t] if has_seen else first
                do = dout[b, t, d0:d1]
                if silu:
                    for j in range(w):
                        acc[j] = bias_w[j]
                    for k in range(taps):
                        if s - k >= first:
                            row = x[b, t + k * back, d0:d1] if s >= k else h0_BWE[b, taps - 1 + s - k, d0:d1]
                            tap = w_WE[taps - 1 - k, d0:d1]
                            for j in range(w):
                                acc[j] += tap[j] * row[j]
                    for j in range(w):
                        v = acc[j]
                        sg = _sigmoid(v)
                        g[j] = do[j] * sg * (_ONE + v * (_ONE - sg))
                else:
                    for j in range(w):
                        g[j] = do[j]
                for j in range(w):
                    dbias_w[j] += g[j]
                for k in range(taps):
                    if s - k >= first:
                        row = x[b, t + k * back, d0:d1] if s >= k else h0_BWE[b, taps - 1 + s - k, d0:d1]
                        total = w_sum[taps - 1 - k]
                        for j in range(w):
                            total[j] += g[j] * row[j]
            else:
                for j in range(w):
                    g[j] = _ZERO
            firsts[s % taps] = first
            p = s - taps + 1
            end = length - 1 - p if reverse else p
            row = dx[b, end, d0:d1] if p >= 0 else dh0_BWE[b, taps - 1 + p, d0:d1]
            for j in range(w):
                acc[j] = _ZERO
            for k in range(taps):
                if firsts[(s - taps + 1 + k) % taps] <= p:
                    g, tap = ring[(s - taps + 1 + k) % taps], w_WE[taps - 1 - k, d0:d1]
                    for j in range(w):
                        acc[j] += tap[j] * g[j]
            for j in range(w):
                row[j] = acc[j]
        for k in range(taps):
            for j in range(w):
                dw[job, k, d0 + j] += w_sum[k, j]
