"""The selective scan in Triton: every tile of the sequence runs at once, so that one long row fills a GPU.

The sequence is cut into tiles. Forward: (1) each tile is scanned from a zero state; (2) a scan over tiles, on what
these leave behind, gives the state that enters each; (3) each tile is scanned from there. Backward needs the inputs
and the entering states: (1) and (2) again for the adjoint state, which runs the other way, then a walk through each
tile from its end, on adjoints alone, and one from its start, on states alone. A warp walks 32 or 64 neighbouring
channels, contiguous in memory, through its tile; all states of a channel stay in one thread's registers.

With a[t] = exp(dt[t] A) and b[t] = dt[t] u[t] B[t]: h[t] = a[t] h[t-1] + b[t]; its adjoint g[t] = dy[t] C[t] +
a[t+1] g[t+1]. What passes from tile to tile is h at the tile's last position and a g at its first one (mirrored where
`reverse`). The gradients of A and dt need q[t] = g[t] a[t] h[t-1], whose factors are never in registers together; but
q[t+1] = q[t] + g[t] b[t] - dy[t] C[t] h[t], so that each walk adds its own part of a sum that begins at the edge of the
tile, where both factors are known.

Nothing is summed by atomics: sums over channels and tiles are written in parts and added in a fixed order, so that
results repeat bit by bit. Sums over a warp's channels are products with zeros and ones, which a GPU does in its matrix
units without moving what is summed, and a few shuffles.
"""

import triton
import triton.language as tl

from genossm.ops.kernels.triton_parts import sigmoid, softplus

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FALSE = tl.constexpr(False)


@triton.jit
def _then(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


# `one` is 1, which the compiler must not know: it would give a thread neighbouring channels, 4 bytes at once, and then
# exchange them between threads at every position, for states of one channel each lie best 32 apart.
@triton.jit
def _place(lengths, E, L, groups, first_tile, one, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
    """Return where a program works; neighbours in the grid share a tile's B and C."""
    row = tl.program_id(1).to(tl.int64)
    tile = first_tile + tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * BD + tl.arange(0, BD) * one
    inside = channel < E
    end = tl.minimum(tl.load(lengths + row), L) if HAS_LENGTHS else L
    # Positions that are real, and that are stored, by channel: none of one that is not there.
    return row, tile, channel, inside, tile.to(tl.int64) * T, tl.where(inside, end, 0), tl.where(inside, L, 0)


@triton.jit
def _several(rows, i, start, ends, step, BACK: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, U: tl.constexpr):
    """Load U positions in the order of a walk, so that all are under way before the first is needed."""
    values = ()
    for k in tl.static_range(U):
        t = T - 1 - i - k if BACK else i + k
        loaded = tl.load(rows + t * step) if EVEN else tl.load(rows + t * step, start + t < ends, 0.0)
        values += (loaded.to(tl.float32),)
    return values


@triton.jit
def _by_state(x, channel, inside, E, N: tl.constexpr, BD: tl.constexpr):
    """Load [states, channels]; state by state, so that all states of a channel come to one thread."""
    values = tl.zeros([N, BD], tl.float32)
    for n in tl.static_range(N):
        values = tl.where(tl.arange(0, N)[:, None] == n, tl.load(x + n * E + channel, inside, 0.0)[None, :], values)
    return values


@triton.jit
def _store_by_state(x, values, channel, inside, E, N: tl.constexpr):
    """Undo `_by_state`."""
    for n in range(N):
        value = tl.sum(tl.where(tl.arange(0, N)[:, None] == n, values, 0.0), 0)
        tl.store(x + n * E + channel, value, inside)


@triton.jit
def _steps(raw, bias, seen, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    steps = softplus(raw + bias) if SOFTPLUS else raw + bias
    return steps if EVEN else tl.where(seen, steps, 0.0)


@triton.jit
def _keep(drop, at, L, t, HAS_DROP: tl.constexpr):
    """Return 0 where the arriving state belongs to another document, else 1."""
    return tl.where(tl.load(drop + at + t, t < L, 0) == 0, 1.0, 0.0) if HAS_DROP else 1.0


@triton.jit
def _chosen(odd, PRECISION: tl.constexpr):
    """Return [32, 16], one where a row's state (of 8) is a column's: 8 at an even position, then 8 at an odd one."""
    k = tl.arange(0, 32)
    chosen = tl.where((k // 8 * 2 + k % 2 + 8 * odd)[:, None] == tl.arange(0, 16)[None, :], 1.0, 0.0)
    return chosen.to(tl.bfloat16) if PRECISION == "bf16" else chosen


# Rows are groups of 4 channels, columns are 8 states of such 4: as 16 bit numbers they lie where the matrix units want
# them, pairs of states in a register and the 4 channels in neighbouring threads, so that nothing is exchanged.
@triton.jit
def _add_sums(sums, x, chosen, N: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Add x [N, BD], summed over 4 neighbouring channels each, to the columns of sums that are chosen."""
    x = tl.permute(tl.reshape(x, [N // 8, 4, 2, BD // 4, 4]), [0, 3, 1, 4, 2])
    x = tl.reshape(x, [N * BD // 32, 32])
    if PRECISION == "bf16":
        sums = tl.dot(x.to(tl.bfloat16), chosen, sums)
    else:
        sums = tl.dot(x, chosen, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _store_sums(sums, to, p, L, N: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr):
    """Store what was added, summed over channels: for position p, which `to` belongs to, and the next of the walk."""
    sums = tl.sum(tl.reshape(sums, [N // 8, BD // 4, 16]), 1)
    column = tl.arange(0, 16)[None, :]
    ahead = -(column // 8) if BACK else column // 8
    at = ahead * N + column % 8 + tl.arange(0, N // 8)[:, None] * 8
    tl.store(to + at, sums.to(to.dtype.element_ty), p + ahead + at * 0 < L)


@triton.jit(do_not_specialize=["one"])
def edges(
    x, dt, z, W, A, bias, drop, lengths, edge, decay,
    one, E, L, tiles, groups, x_b, x_l, x_e, dt_b, dt_l, dt_e, z_b, z_l, z_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, HAS_DROP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ADJOINT: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Compute what each tile passes on from a zero start: of x = u and W = B, or for the adjoint x = dy and W = C."""
    row, tile, channel, inside, start, ends, _ = _place(lengths, E, L, groups, 0, one, HAS_LENGTHS, BD, T)
    wide = channel.to(tl.int64)
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    x_at = x + row * x_b + start * x_l + wide * x_e
    dt_at = dt + row * dt_b + start * dt_l + wide * dt_e
    W_at = W + (row * tiles * T + start) * N
    rates = _by_state(A, channel, inside, E, N, BD)
    states = tl.zeros([N, BD], tl.float32)
    whole = tl.zeros([BD], tl.float32)
    kept = 1.0
    BACK: tl.constexpr = ADJOINT != REVERSE
    for i in range(0, T, U):
        raw = _several(dt_at, i, start, ends, dt_l, BACK, EVEN, T, U)
        values = _several(x_at, i, start, ends, x_l, BACK, EVEN, T, U)
        gates = values
        if ADJOINT and HAS_Z:
            z_at = z + row * z_b + start * z_l + wide * z_e
            gates = _several(z_at, i, start, ends, z_l, BACK, EVEN, T, U)
        for k in tl.static_range(U):
            t = T - 1 - i - k if BACK else i + k
            step = _steps(raw[k], rate_bias, start + t < ends, SOFTPLUS, EVEN)
            value = values[k]
            if not ADJOINT:
                value = value * step
            elif HAS_Z:
                value = value * gates[k] * sigmoid(gates[k])
            keep = _keep(drop, row * L, L, start + t, HAS_DROP)
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            entered = value[None, :] * tl.load(W_at + t * N + tl.arange(0, N))[:, None]
            states = a * (states + entered) if ADJOINT else a * states + entered
            whole += step
            kept *= keep
    # Not a number marks a tile that nothing passes through.
    tl.store(decay + (row * tiles + tile) * E + channel, tl.where(kept == 0.0, float("nan"), whole), inside)
    _store_by_state(edge + (row * tiles + tile) * N * E, states, channel, inside, E, N)


@triton.jit
def chain(
    edge, decay, A, first, entering, last, E, tiles, N: tl.constexpr, HAS_FIRST: tl.constexpr,
    LEFTWARD: tl.constexpr, WIDTH: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Scan over tiles: what enters each of them and what leaves the last one. One lane is one (state, channel)."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < E * N
    rate = tl.load(A + lane, inside, 0.0)
    carried = tl.zeros([WIDTH], tl.float32)
    if HAS_FIRST:
        carried = tl.load(first + row * E * N + lane, inside, 0.0)
    begin = tiles - 1 if LEFTWARD else 0
    tl.store(entering + (row * tiles + begin) * E * N + lane, carried, inside)
    u = tl.arange(0, U)[:, None]
    for k0 in range(0, tiles, U):
        k = k0 + u
        tile = tiles - 1 - k if LEFTWARD else k
        real = (k < tiles) & inside[None, :]
        at = (row * tiles + tile) * E
        span = tl.load(decay + at + (lane % E)[None, :], real, 0.0)
        a = tl.where(span == span, tl.exp2(rate[None, :] * span), 0.0)
        x = tl.load(edge + at * N + lane[None, :], real, 0.0)
        a, x = tl.associative_scan((a, x), 0, _then)
        x = x + a * carried[None, :]
        after = -1 if LEFTWARD else 1
        tl.store(entering + (row * tiles + tile + after) * E * N + lane[None, :], x, real & (k + 1 < tiles))
        carried = tl.sum(tl.where(u == U - 1, x, 0.0), 0)
    tl.store(last + row * E * N + lane, carried, inside)


@triton.jit(do_not_specialize=["one"])
def forward(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, y,
    one, E, L, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, y_b, y_l, y_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Scan each tile from the state that enters it; the result is added to what is there where ADD."""
    row, tile, channel, inside, start, ends, lasts = _place(lengths, E, L, groups, 0, one, HAS_LENGTHS, BD, T)
    wide = channel.to(tl.int64)
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + channel, inside, 0.0) if HAS_D else 0.0
    u_at = u + row * u_b + start * u_l + wide * u_e
    dt_at = dt + row * dt_b + start * dt_l + wide * dt_e
    y_at = y + row * y_b + start * y_l + wide * y_e
    at = (row * tiles * T + start) * N
    B_at, C_at = B + at, C + at
    rates = _by_state(A, channel, inside, E, N, BD)
    states = _by_state(entering + (row * tiles + tile) * N * E, channel, inside, E, N, BD)
    for i in range(0, T, U):
        raw = _several(dt_at, i, start, ends, dt_l, REVERSE, EVEN, T, U)
        values = _several(u_at, i, start, ends, u_l, REVERSE, EVEN, T, U)
        gates = values
        others = values
        if HAS_Z:
            z_at = z + row * z_b + start * z_l + wide * z_e
            gates = _several(z_at, i, start, ends, z_l, REVERSE, EVEN, T, U)
        if ADD:
            others = _several(y_at, i, start, lasts, y_l, REVERSE, EVEN, T, U)
        for k in tl.static_range(U):
            t = T - 1 - i - k if REVERSE else i + k
            step = _steps(raw[k], rate_bias, start + t < ends, SOFTPLUS, EVEN)
            value = step * values[k]
            keep = _keep(drop, row * L, L, start + t, HAS_DROP)
            result = skip * values[k]
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            states = a * states + value[None, :] * tl.load(B_at + t * N + tl.arange(0, N))[:, None]
            result += tl.sum(tl.load(C_at + t * N + tl.arange(0, N))[:, None] * states, 0)
            if HAS_Z:
                result = result * gates[k] * sigmoid(gates[k])
            if not EVEN:
                result = tl.where(start + t < ends, result, 0.0)
            if ADD:
                result += others[k]
            tl.store(y_at + t * y_l, result.to(y.dtype.element_ty), start + t < lasts)


@triton.jit(do_not_specialize=["one"])
def backward(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, adjoint, dy, du, ddt, dz, partial, dA_parts, dB_parts,
    dC_parts, dD_parts, dbias_parts, first_tile, piece,
    one, E, L, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, dy_b, dy_l, dy_e, du_b, du_l, du_e,
    ddt_b, ddt_l, ddt_e, dz_b, dz_l, dz_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk each tile from its end with adjoints, then from its start with states; dz is added to where ADD.

    Registers leave room for few warps, which hide little: each walk loads what it needs next before it needs it.
    """
    row, tile, channel, inside, start, ends, lasts = _place(lengths, E, L, groups, first_tile, one, HAS_LENGTHS, BD, T)
    wide = channel.to(tl.int64)
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + channel, inside, 0.0) if HAS_D else 0.0
    u_at = u + row * u_b + start * u_l + wide * u_e
    dt_at = dt + row * dt_b + start * dt_l + wide * dt_e
    z_at = z + row * z_b + start * z_l + wide * z_e if HAS_Z else u_at
    dy_at = dy + row * dy_b + start * dy_l + wide * dy_e
    at = (row * tiles * T + start) * N
    B_at, C_at = B + at, C + at
    n = tl.arange(0, N)
    # Within the piece: what this kernel keeps for itself, and parts, which lie as (row, group, position, state).
    inner = (tile - first_tile) * T
    partial_at = partial + (row * piece + inner) * E + wide
    parts_at = ((row * groups + tl.program_id(0) % groups) * piece + inner) * N
    even, odd = _chosen(0, PRECISION), _chosen(1, PRECISION)
    nothing = tl.zeros([N * BD // 32, 16], tl.float32)
    rates = _by_state(A, channel, inside, E, N, BD)
    passed = _by_state(adjoint + (row * tiles + tile) * N * E, channel, inside, E, N, BD)
    d_A = tl.zeros([N, BD], tl.float32)
    d_D = tl.zeros([BD], tl.float32)
    d_bias = tl.zeros([BD], tl.float32)
    # Steps after a position, and the sum of g b A over those from it on.
    rest = tl.zeros([BD], tl.float32)
    fed = tl.zeros([BD], tl.float32)
    BACK: tl.constexpr = REVERSE == _FALSE
    next_raw = _several(dt_at, 0, start, ends, dt_l, BACK, EVEN, T, U)
    next_inputs = _several(u_at, 0, start, ends, u_l, BACK, EVEN, T, U)
    next_grads = _several(dy_at, 0, start, ends, dy_l, BACK, EVEN, T, U)
    next_gates = _several(z_at, 0, start, ends, z_l, BACK, EVEN, T, U) if HAS_Z else next_inputs
    t_first = T - 1 if BACK else 0
    next_B, next_C = tl.load(B_at + t_first * N + n), tl.load(C_at + t_first * N + n)
    for i in range(0, T, U):
        raw, inputs, grads, gates = next_raw, next_inputs, next_grads, next_gates
        ahead = tl.minimum(i + U, T - U)
        next_raw = _several(dt_at, ahead, start, ends, dt_l, BACK, EVEN, T, U)
        next_inputs = _several(u_at, ahead, start, ends, u_l, BACK, EVEN, T, U)
        next_grads = _several(dy_at, ahead, start, ends, dy_l, BACK, EVEN, T, U)
        next_gates = _several(z_at, ahead, start, ends, z_l, BACK, EVEN, T, U) if HAS_Z else next_inputs
        sums = nothing
        for k in tl.static_range(U):
            t = T - 1 - i - k if BACK else i + k
            B_here, C_here = next_B, next_C
            t_next = tl.maximum(t - 1, 0) if BACK else tl.minimum(t + 1, T - 1)
            next_B, next_C = tl.load(B_at + t_next * N + n), tl.load(C_at + t_next * N + n)
            step = _steps(raw[k], rate_bias, start + t < ends, SOFTPLUS, EVEN)
            value = step * inputs[k]
            grad = grads[k] * gates[k] * sigmoid(gates[k]) if HAS_Z else grads[k]
            keep = _keep(drop, row * L, L, start + t, HAS_DROP)
            weight = rest * value
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            g = grad[None, :] * C_here[:, None] + passed
            read = g * B_here[:, None]
            passed = a * g
            d_A += weight[None, :] * read
            d_value = tl.sum(read, 0)
            if k % 2 == 0:
                sums = _add_sums(nothing, g * value[None, :], even, N, BD, PRECISION)
            else:
                sums = _add_sums(sums, g * value[None, :], odd, N, BD, PRECISION)
                before = t + 1 if BACK else t - 1
                _store_sums(sums, dB_parts + parts_at + before * N, start + before, L, N, BD, BACK)
            stored = start + t < lasts
            fed += value * tl.sum(rates * read, 0)
            rest += step
            d_D += grad * inputs[k]
            tl.store(partial_at + t * E, d_value * inputs[k] - fed * _LN2, stored)
            d_u = (skip * grad + step * d_value).to(du.dtype.element_ty)
            tl.store(du + row * du_b + start * du_l + wide * du_e + t * du_l, d_u, stored)
    # Both factors of q at the tile's first position.
    states = _by_state(entering + (row * tiles + tile) * N * E, channel, inside, E, N, BD)
    q = passed * states
    decayed = fed + tl.sum(rates * q, 0)
    d_A += rest[None, :] * q
    dz_at = dz + row * dz_b + start * dz_l + wide * dz_e if HAS_Z else partial_at
    next_raw = _several(dt_at, 0, start, ends, dt_l, REVERSE, EVEN, T, U)
    next_inputs = _several(u_at, 0, start, ends, u_l, REVERSE, EVEN, T, U)
    next_grads = _several(dy_at, 0, start, ends, dy_l, REVERSE, EVEN, T, U)
    next_partials = _several(partial_at, 0, start, lasts, E, REVERSE, EVEN, T, U)
    next_gates = _several(z_at, 0, start, ends, z_l, REVERSE, EVEN, T, U) if HAS_Z else next_inputs
    next_others = _several(dz_at, 0, start, lasts, dz_l, REVERSE, EVEN, T, U) if HAS_Z and ADD else next_inputs
    t_first = T - 1 if REVERSE else 0
    next_B, next_C = tl.load(B_at + t_first * N + n), tl.load(C_at + t_first * N + n)
    for i in range(0, T, U):
        raw, inputs, grads, gates = next_raw, next_inputs, next_grads, next_gates
        partials, others = next_partials, next_others
        ahead = tl.minimum(i + U, T - U)
        next_raw = _several(dt_at, ahead, start, ends, dt_l, REVERSE, EVEN, T, U)
        next_inputs = _several(u_at, ahead, start, ends, u_l, REVERSE, EVEN, T, U)
        next_grads = _several(dy_at, ahead, start, ends, dy_l, REVERSE, EVEN, T, U)
        next_partials = _several(partial_at, ahead, start, lasts, E, REVERSE, EVEN, T, U)
        next_gates = _several(z_at, ahead, start, ends, z_l, REVERSE, EVEN, T, U) if HAS_Z else next_inputs
        next_others = _several(dz_at, ahead, start, lasts, dz_l, REVERSE, EVEN, T, U) if HAS_Z and ADD else next_inputs
        sums = nothing
        for k in tl.static_range(U):
            t = T - 1 - i - k if REVERSE else i + k
            B_here, C_here = next_B, next_C
            t_next = tl.maximum(t - 1, 0) if REVERSE else tl.minimum(t + 1, T - 1)
            next_B, next_C = tl.load(B_at + t_next * N + n), tl.load(C_at + t_next * N + n)
            step = _steps(raw[k], rate_bias, start + t < ends, SOFTPLUS, EVEN)
            value = step * inputs[k]
            s = sigmoid(gates[k])
            grad = grads[k] * gates[k] * s if HAS_Z else grads[k]
            keep = _keep(drop, row * L, L, start + t, HAS_DROP)
            rest -= step
            weight = rest * grad
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            states = a * states + value[None, :] * B_here[:, None]
            read = states * C_here[:, None]
            d_A -= weight[None, :] * read
            out = skip * inputs[k] + tl.sum(read, 0)
            if k % 2 == 0:
                sums = _add_sums(nothing, states * grad[None, :], even, N, BD, PRECISION)
            else:
                sums = _add_sums(sums, states * grad[None, :], odd, N, BD, PRECISION)
                before = t + 1 if REVERSE else t - 1
                _store_sums(sums, dC_parts + parts_at + before * N, start + before, L, N, BD, REVERSE)
            stored = start + t < lasts
            d_step = partials[k] + decayed * _LN2
            decayed -= grad * tl.sum(rates * read, 0)
            if SOFTPLUS:
                d_step = d_step * sigmoid(raw[k] + rate_bias)
            if not EVEN:
                d_step = tl.where(start + t < ends, d_step, 0.0)
            d_bias += d_step
            ddt_at = ddt + row * ddt_b + start * ddt_l + wide * ddt_e + t * ddt_l
            tl.store(ddt_at, d_step.to(ddt.dtype.element_ty), stored)
            if HAS_Z:
                d_z = grads[k] * out * s * (1.0 + gates[k] * (1.0 - s))
                if ADD:
                    d_z += others[k]
                tl.store(dz_at + t * dz_l, d_z.to(dz.dtype.element_ty), stored)
    _store_by_state(dA_parts + (row * tiles + tile) * N * E, d_A, channel, inside, E, N)
    if HAS_D:
        tl.store(dD_parts + (row * tiles + tile) * E + channel, d_D, inside)
    if HAS_BIAS:
        tl.store(dbias_parts + (row * tiles + tile) * E + channel, d_bias, inside)
