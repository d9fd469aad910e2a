"""The selective scan in Triton: every tile of the sequence runs at once, so that one long row fills a GPU.

The sequence is cut into tiles. Forward: (1) each tile is scanned from a zero state; (2) a scan over tiles, on what
these leave behind, gives the state that enters each; (3) each tile is scanned from there. Backward needs the inputs
and the entering states: (1) and (2) again for the adjoint state, which runs the other way, then a walk through each
tile from its end, on adjoints alone, and one from its start, on states alone. A warp walks 32 or 64 neighbouring
channels, contiguous in memory, through its tile; all states of a channel stay in one thread's registers.

With a[t] = exp(dt[t] A) and b[t] = dt[t] u[t] B[t]: h[t] = a[t] h[t-1] + b[t]; its adjoint g[t] = dy[t] C[t] +
a[t+1] g[t+1]. What passes from tile to tile is h at the tile's last position and a g at its first one (mirrored where
the scan runs leftward). The gradients of A and dt need q[t] = g[t] a[t] h[t-1], whose factors are never in registers
together; but q[t+1] = q[t] + g[t] b[t] - dy[t] C[t] h[t], so that each walk adds its own part of a sum that begins at
the edge of the tile, where both factors are known.

Nothing is summed by atomics: sums over channels and tiles are written in parts and added in a fixed order, so that
results repeat bit by bit. Sums over a warp's channels are products with zeros and ones, which a GPU does in its matrix
units without moving what is summed, and a few shuffles.

What differs from one shape to the next, direction and tile length too, is told to a compiled kernel as a number, so
that a new shape compiles nothing. Each memory operation costs the compiler about as much as the square of all that it
can reach, so that there are few of them, and no kernel walks twice.
"""

import triton
import triton.language as tl

from genossm.ops.kernels.triton_parts import sigmoid, softplus, softplus_slope

_LN2 = tl.constexpr(0.6931471805599453)
# One kernel serves all shapes, and tensors that begin anywhere.
_walk = triton.jit(
    do_not_specialize=[
        *("one", "E", "L", "T", "tiles", "groups", "leftward", "add", "first_tile", "piece"),
        *(f"{x}_{axis}" for x in ("u", "dt", "z", "x", "y", "dy", "du", "ddt", "dz") for axis in "ble"),
    ],
    do_not_specialize_on_alignment=["u", "dt", "z", "x", "y", "dy", "du", "ddt", "dz", "drop", "lengths"],
)


@triton.jit
def _then(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


# `one` is 1, which the compiler must not know: it would give a thread neighbouring channels, 4 bytes at once, and then
# exchange them between threads at every position, for states of one channel each lie best 32 apart.
@triton.jit
def _place(lengths, E, L, T, groups, first_tile, one, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr):
    """Return where a program works; neighbours in the grid share a tile's B and C."""
    row = tl.program_id(1).to(tl.int64)
    tile = first_tile + tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * BD + tl.arange(0, BD) * one
    inside = channel < E
    start = tile.to(tl.int64) * T
    end = tl.minimum(tl.load(lengths + row), L) if HAS_LENGTHS else L
    # The tile's positions that are real, and that are stored, by channel: none of one that is not there.
    real = tl.where(inside, tl.minimum(end - start, T).to(tl.int32), 0)
    stored = tl.where(inside, tl.minimum(L - start, T).to(tl.int32), 0)
    return row, tile, channel, inside, start, real, stored


@triton.jit
def _order(leftward, T):
    """Return the first position of a walk and the way to the next."""
    return tl.where(leftward != 0, T - 1, 0), tl.where(leftward != 0, -1, 1)


@triton.jit
def _several(rows, i, step, begin, way, ends, U: tl.constexpr):
    """Load U positions in the order of a walk, so that all are under way before the first is needed."""
    values = ()
    for k in tl.static_range(U):
        values += (tl.load(rows + (i + k) * step, begin + (i + k) * way < ends, 0.0).to(tl.float32),)
    return values


@triton.jit
def _by_state(x, channel, inside, E, N: tl.constexpr, BD: tl.constexpr):
    """Load [states, channels], state by state: Triton 3.6 would share the states of a channel out among threads."""
    values = tl.zeros([N, BD], tl.float32)
    for n in range(N):
        values = tl.where(tl.arange(0, N)[:, None] == n, tl.load(x + n * E + channel, inside, 0.0)[None, :], values)
    return values


@triton.jit
def _store_by_state(x, values, channel, inside, E, N: tl.constexpr):
    """Undo `_by_state`."""
    for n in range(N):
        value = tl.sum(tl.where(tl.arange(0, N)[:, None] == n, values, 0.0), 0)
        tl.store(x + n * E + channel, value, inside)


@triton.jit
def _unpacked(x, N: tl.constexpr):
    """Return N numbers of x: float32, or pairs of bfloat16 as whole numbers, which take half of what loads take."""
    if x.dtype == tl.int32:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), [N])
    else:
        return x.to(tl.float32)


@triton.jit
def _step(raw, bias, seen, SOFTPLUS: tl.constexpr):
    raw += bias
    return tl.where(seen, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _keep(drop, at, t, L, HAS_DROP: tl.constexpr):
    """Return 0 where the arriving state belongs to another document, else 1."""
    return tl.where(tl.load(drop + at + t, t < L, 0) == 0, 1.0, 0.0) if HAS_DROP else 1.0


@triton.jit
def _chosen(odd, PRECISION: tl.constexpr):
    """Return [16, 32], one where a column's state (of 8) is a row's: 8 at an even position, then 8 at an odd one."""
    k = tl.arange(0, 32)
    chosen = tl.where((k // 8 * 2 + k % 2 + 8 * odd)[None, :] == tl.arange(0, 16)[:, None], 1.0, 0.0)
    return chosen.to(tl.bfloat16) if PRECISION == "bf16" else chosen


# Columns are groups of 4 channels, rows are 8 states of such 4: as 16 bit numbers they lie where the matrix units want
# them, pairs of states in a register and the 4 channels in neighbouring threads, so that nothing is exchanged. As the
# second factor they leave two groups to a thread of the sums, so that the rest takes two shuffles, not three.
@triton.jit
def _add_sums(sums, x, chosen, N: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Add x [N, BD], summed over 4 neighbouring channels each, to the rows of sums that are chosen."""
    x = tl.permute(tl.reshape(x, [N // 8, 4, 2, BD // 4, 4]), [1, 4, 2, 0, 3])
    x = tl.reshape(x, [32, N * BD // 32])
    if PRECISION == "bf16":
        sums = tl.dot(chosen, x.to(tl.bfloat16), sums)
    else:
        sums = tl.dot(chosen, x, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _store_sums(sums, to, way, N: tl.constexpr, BD: tl.constexpr):
    """Store what was added, summed over channels: for a position, which `to` belongs to, and the next of the walk."""
    sums = tl.sum(tl.reshape(sums, [16, N // 8, BD // 4]), 2)
    row = tl.arange(0, 16)[:, None]
    at = row // 8 * (way * N) + row % 8 + tl.arange(0, N // 8)[None, :] * 8
    tl.store(to + at, sums.to(to.dtype.element_ty))


@_walk
def edges(
    x, dt, z, W, A, bias, drop, lengths, edge, decay,
    leftward, one, E, L, T, tiles, groups, x_b, x_l, x_e, dt_b, dt_l, dt_e, z_b, z_l, z_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, HAS_DROP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ADJOINT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Compute what each tile passes on from a zero start: of x = u and W = B, or for the adjoint x = dy and W = C."""
    row, tile, channel, inside, start, real, _ = _place(lengths, E, L, T, groups, 0, one, HAS_LENGTHS, BD)
    begin, way = _order(leftward, T)
    wide = channel.to(tl.int64)
    first = start + begin
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    x_at = x + row * x_b + first * x_l + wide * x_e
    dt_at = dt + row * dt_b + first * dt_l + wide * dt_e
    z_at = z + row * z_b + first * z_l + wide * z_e if HAS_Z and ADJOINT else x_at
    H: tl.constexpr = N // 2 if W.dtype.element_ty == tl.int32 else N
    W_at = W + (row * tiles * T + first) * H + tl.arange(0, H)
    rates = _by_state(A, channel, inside, E, N, BD)
    states = tl.zeros([N, BD], tl.float32)
    whole = tl.zeros([BD], tl.float32)
    kept = 1.0
    for i in range(0, T, U):
        raw = _several(dt_at, i, dt_l * way, begin, way, real, U)
        values = _several(x_at, i, x_l * way, begin, way, real, U)
        gates = _several(z_at, i, z_l * way, begin, way, real, U) if HAS_Z and ADJOINT else values
        for k in tl.static_range(U):
            t = begin + (i + k) * way
            W_here = _unpacked(tl.load(W_at + (i + k) * (way * H)), N)
            step = _step(raw[k], rate_bias, t < real, SOFTPLUS)
            value = values[k]
            if not ADJOINT:
                value = value * step
            elif HAS_Z:
                gate = gates[k]
                value = value * gate * sigmoid(gate)
            keep = _keep(drop, row * L, start + t, L, HAS_DROP)
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            entered = value[None, :] * W_here[:, None]
            states = a * (states + entered) if ADJOINT else a * states + entered
            whole += step
            kept *= keep
    # Not a number marks a tile that nothing passes through.
    tl.store(decay + (row * tiles + tile) * E + channel, tl.where(kept == 0.0, float("nan"), whole), inside)
    _store_by_state(edge + (row * tiles + tile) * N * E, states, channel, inside, E, N)


@_walk
def chain(
    edge, decay, A, first, entering, last, leftward, E, tiles, N: tl.constexpr, HAS_FIRST: tl.constexpr,
    WIDTH: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Scan over tiles: what enters each of them and what leaves the last one. One lane is one (state, channel)."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < E * N
    begin, way = _order(leftward, tiles)
    rate = tl.load(A + lane, inside, 0.0)
    carried = tl.zeros([WIDTH], tl.float32)
    if HAS_FIRST:
        carried = tl.load(first + row * E * N + lane, inside, 0.0)
    tl.store(entering + (row * tiles + begin) * E * N + lane, carried, inside)
    u = tl.arange(0, U)[:, None]
    for k0 in range(0, tiles, U):
        k = k0 + u
        real = (k < tiles) & inside[None, :]
        at = (row * tiles + begin + k * way) * E
        span = tl.load(decay + at + (lane % E)[None, :], real, 0.0)
        a = tl.where(span == span, tl.exp2(rate[None, :] * span), 0.0)
        x = tl.load(edge + at * N + lane[None, :], real, 0.0)
        a, x = tl.associative_scan((a, x), 0, _then)
        x = x + a * tl.expand_dims(carried, 0)
        tl.store(entering + (at + way * E) * N + lane[None, :], x, real & (k + 1 < tiles))
        carried = tl.sum(tl.where(u == U - 1, x, 0.0), 0)
    tl.store(last + row * E * N + lane, carried, inside)


@_walk
def forward(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, last, y,
    add, leftward, one, E, L, T, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, y_b, y_l, y_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Scan each tile from the state that enters it; the result is added to what is there where `add` is not 0."""
    row, tile, channel, inside, start, real, stored = _place(lengths, E, L, T, groups, 0, one, HAS_LENGTHS, BD)
    begin, way = _order(leftward, T)
    wide = channel.to(tl.int64)
    first = start + begin
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + channel, inside, 0.0) if HAS_D else 0.0
    u_at = u + row * u_b + first * u_l + wide * u_e
    dt_at = dt + row * dt_b + first * dt_l + wide * dt_e
    z_at = z + row * z_b + first * z_l + wide * z_e if HAS_Z else u_at
    y_at = y + row * y_b + first * y_l + wide * y_e
    H: tl.constexpr = N // 2 if B.dtype.element_ty == tl.int32 else N
    shared = (row * tiles * T + first) * H + tl.arange(0, H)
    B_at, C_at = B + shared, C + shared
    rates = _by_state(A, channel, inside, E, N, BD)
    states = _by_state(entering + (row * tiles + tile) * N * E, channel, inside, E, N, BD)
    added = tl.where(add != 0, stored, 0)
    for i in range(0, T, U):
        raw = _several(dt_at, i, dt_l * way, begin, way, real, U)
        values = _several(u_at, i, u_l * way, begin, way, real, U)
        gates = _several(z_at, i, z_l * way, begin, way, real, U) if HAS_Z else values
        others = _several(y_at, i, y_l * way, begin, way, added, U)
        for k in tl.static_range(U):
            t = begin + (i + k) * way
            B_here = _unpacked(tl.load(B_at + (i + k) * (way * H)), N)
            C_here = _unpacked(tl.load(C_at + (i + k) * (way * H)), N)
            step = _step(raw[k], rate_bias, t < real, SOFTPLUS)
            value = values[k]
            keep = _keep(drop, row * L, start + t, L, HAS_DROP)
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            states = a * states + (step * value)[None, :] * B_here[:, None]
            result = skip * value + tl.sum(C_here[:, None] * states, 0)
            if HAS_Z:
                gate = gates[k]
                result = result * gate * sigmoid(gate)
            if HAS_LENGTHS:
                result = tl.where(t < real, result, 0.0)
            result += others[k]
            tl.store(y_at + (i + k) * (y_l * way), result.to(y.dtype.element_ty), t < stored)
    _store_by_state(last + row * N * E, states, channel, channel < tl.where(tiles == 1, E, 0), E, N)


@_walk
def backward_adjoint(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, adjoint, last, dy, du, partial, dA_parts, dB_parts, dD_parts,
    handed,
    first_tile, piece, leftward, one, E, L, T, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e,
    dy_b, dy_l, dy_e, du_b, du_l, du_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk each tile from its end with adjoints: gradients of u, B and D, and what `backward_state` needs of these.

    Registers leave room for few warps, which hide little: both walks load what they need next before they need it.
    """
    row, tile, channel, inside, start, real, stored = _place(lengths, E, L, T, groups, first_tile, one, HAS_LENGTHS, BD)
    begin, way = _order(leftward, T)
    wide = channel.to(tl.int64)
    first = start + begin
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + channel, inside, 0.0) if HAS_D else 0.0
    u_at = u + row * u_b + first * u_l + wide * u_e
    dt_at = dt + row * dt_b + first * dt_l + wide * dt_e
    z_at = z + row * z_b + first * z_l + wide * z_e if HAS_Z else u_at
    dy_at = dy + row * dy_b + first * dy_l + wide * dy_e
    du_at = du + row * du_b + first * du_l + wide * du_e
    shared = (row * tiles * T + first) * N + tl.arange(0, N)
    B_at, C_at = B + shared, C + shared
    # Within the piece: what is left for the other walk, and parts, which lie as (row, group, position, state).
    inner = (tile - first_tile) * T + begin
    partial_at = partial + (row * piece + inner) * E + wide
    parts_at = dB_parts + ((row * groups + tl.program_id(0) % groups) * piece + inner) * N
    even, odd = _chosen(0, PRECISION), _chosen(1, PRECISION)
    nothing = tl.zeros([16, N * BD // 32], tl.float32)
    edge = (row * tiles + tile) * N * E
    rates = _by_state(A, channel, inside, E, N, BD)
    passed = _by_state(adjoint + edge, channel, inside, E, N, BD)
    d_A = tl.zeros([N, BD], tl.float32)
    d_D = tl.zeros([BD], tl.float32)
    # Steps after a position, and the sum of g b A over those from it on.
    rest = tl.zeros([BD], tl.float32)
    fed = tl.zeros([BD], tl.float32)
    next_raw = _several(dt_at, 0, dt_l * way, begin, way, real, U)
    next_inputs = _several(u_at, 0, u_l * way, begin, way, real, U)
    next_grads = _several(dy_at, 0, dy_l * way, begin, way, real, U)
    next_gates = _several(z_at, 0, z_l * way, begin, way, real, U) if HAS_Z else next_inputs
    next_B, next_C = tl.load(B_at), tl.load(C_at)
    for i in range(0, T, U):
        raw, inputs, grads, gates = next_raw, next_inputs, next_grads, next_gates
        ahead = tl.minimum(i + U, T - U)
        next_raw = _several(dt_at, ahead, dt_l * way, begin, way, real, U)
        next_inputs = _several(u_at, ahead, u_l * way, begin, way, real, U)
        next_grads = _several(dy_at, ahead, dy_l * way, begin, way, real, U)
        next_gates = _several(z_at, ahead, z_l * way, begin, way, real, U) if HAS_Z else next_inputs
        sums = nothing
        for k in tl.static_range(U):
            t = begin + (i + k) * way
            B_here, C_here = next_B, next_C
            following = tl.minimum(i + k + 1, T - 1) * (way * N)
            next_B, next_C = tl.load(B_at + following), tl.load(C_at + following)
            step = _step(raw[k], rate_bias, t < real, SOFTPLUS)
            input_ = inputs[k]
            value = step * input_
            grad = grads[k]
            if HAS_Z:
                gate = gates[k]
                grad = grad * gate * sigmoid(gate)
            keep = _keep(drop, row * L, start + t, L, HAS_DROP)
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
                _store_sums(sums, parts_at + (i + k - 1) * (way * N), way, N, BD)
            fed += value * tl.sum(rates * read, 0)
            rest += step
            d_D += grad * input_
            tl.store(partial_at + (i + k) * (way * E), d_value * input_ - fed * _LN2, inside)
            d_u = (skip * grad + step * d_value).to(du.dtype.element_ty)
            tl.store(du_at + (i + k) * (du_l * way), d_u, t < stored)
    _store_by_state(last + row * N * E, passed, channel, channel < tl.where(tiles == 1, E, 0), E, N)
    # Both factors of q at the tile's first position.
    q = passed * _by_state(entering + edge, channel, inside, E, N, BD)
    _store_by_state(dA_parts + edge, d_A + rest[None, :] * q, channel, inside, E, N)
    handed_at = handed + (row * tiles + tile) * 2 * E + channel
    tl.store(handed_at, rest, inside)
    tl.store(handed_at + E, fed + tl.sum(rates * q, 0), inside)
    if HAS_D:
        tl.store(dD_parts + (row * tiles + tile) * E + channel, d_D, inside)


@_walk
def backward_state(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, dy, ddt, dz, partial, dA_parts, dC_parts, dbias_parts, handed,
    add, first_tile, piece, leftward, one, E, L, T, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e,
    dy_b, dy_l, dy_e, ddt_b, ddt_l, ddt_e, dz_b, dz_l, dz_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk each tile from its start with states: gradients of dt, z, A, C and bias; dz is added to where `add`."""
    row, tile, channel, inside, start, real, stored = _place(lengths, E, L, T, groups, first_tile, one, HAS_LENGTHS, BD)
    begin, way = _order(leftward, T)
    wide = channel.to(tl.int64)
    first = start + begin
    rate_bias = tl.load(bias + channel, inside, 0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + channel, inside, 0.0) if HAS_D else 0.0
    u_at = u + row * u_b + first * u_l + wide * u_e
    dt_at = dt + row * dt_b + first * dt_l + wide * dt_e
    z_at = z + row * z_b + first * z_l + wide * z_e if HAS_Z else u_at
    dy_at = dy + row * dy_b + first * dy_l + wide * dy_e
    ddt_at = ddt + row * ddt_b + first * ddt_l + wide * ddt_e
    dz_at = dz + row * dz_b + first * dz_l + wide * dz_e if HAS_Z else ddt_at
    shared = (row * tiles * T + first) * N + tl.arange(0, N)
    B_at, C_at = B + shared, C + shared
    inner = (tile - first_tile) * T + begin
    partial_at = partial + (row * piece + inner) * E + wide
    parts_at = dC_parts + ((row * groups + tl.program_id(0) % groups) * piece + inner) * N
    even, odd = _chosen(0, PRECISION), _chosen(1, PRECISION)
    nothing = tl.zeros([16, N * BD // 32], tl.float32)
    edge = (row * tiles + tile) * N * E
    rates = _by_state(A, channel, inside, E, N, BD)
    states = _by_state(entering + edge, channel, inside, E, N, BD)
    d_A = _by_state(dA_parts + edge, channel, inside, E, N, BD)
    d_bias = tl.zeros([BD], tl.float32)
    handed_at = handed + (row * tiles + tile) * 2 * E + channel
    rest = tl.load(handed_at, inside, 0.0)
    decayed = tl.load(handed_at + E, inside, 0.0)
    added = tl.where(add != 0, stored, 0)
    whole = tl.where(inside, T, 0)
    next_raw = _several(dt_at, 0, dt_l * way, begin, way, real, U)
    next_inputs = _several(u_at, 0, u_l * way, begin, way, real, U)
    next_grads = _several(dy_at, 0, dy_l * way, begin, way, real, U)
    next_partials = _several(partial_at, 0, E * way, begin, way, whole, U)
    next_gates = _several(z_at, 0, z_l * way, begin, way, real, U) if HAS_Z else next_inputs
    next_B, next_C = tl.load(B_at), tl.load(C_at)
    for i in range(0, T, U):
        raw, inputs, grads, gates, partials = next_raw, next_inputs, next_grads, next_gates, next_partials
        ahead = tl.minimum(i + U, T - U)
        next_raw = _several(dt_at, ahead, dt_l * way, begin, way, real, U)
        next_inputs = _several(u_at, ahead, u_l * way, begin, way, real, U)
        next_grads = _several(dy_at, ahead, dy_l * way, begin, way, real, U)
        next_partials = _several(partial_at, ahead, E * way, begin, way, whole, U)
        next_gates = _several(z_at, ahead, z_l * way, begin, way, real, U) if HAS_Z else next_inputs
        others = _several(dz_at, i, dz_l * way, begin, way, added, U) if HAS_Z else inputs
        sums = nothing
        for k in tl.static_range(U):
            t = begin + (i + k) * way
            B_here, C_here = next_B, next_C
            following = tl.minimum(i + k + 1, T - 1) * (way * N)
            next_B, next_C = tl.load(B_at + following), tl.load(C_at + following)
            step = _step(raw[k], rate_bias, t < real, SOFTPLUS)
            input_ = inputs[k]
            grad = grads[k]
            d_gate = grad
            if HAS_Z:
                gate = gates[k]
                s = sigmoid(gate)
                d_gate = grad * s * (1.0 + gate * (1.0 - s))
                grad = grad * gate * s
            keep = _keep(drop, row * L, start + t, L, HAS_DROP)
            rest -= step
            weight = rest * grad
            a = tl.exp2(step[None, :] * rates)
            a = a * keep if HAS_DROP else a
            states = a * states + (step * input_)[None, :] * B_here[:, None]
            read = states * C_here[:, None]
            d_A -= weight[None, :] * read
            if k % 2 == 0:
                sums = _add_sums(nothing, states * grad[None, :], even, N, BD, PRECISION)
            else:
                sums = _add_sums(sums, states * grad[None, :], odd, N, BD, PRECISION)
                _store_sums(sums, parts_at + (i + k - 1) * (way * N), way, N, BD)
            d_step = partials[k] + decayed * _LN2
            decayed -= grad * tl.sum(rates * read, 0)
            if SOFTPLUS:
                d_step = d_step * softplus_slope(raw[k] + rate_bias)
            d_step = tl.where(t < real, d_step, 0.0)
            d_bias += d_step
            tl.store(ddt_at + (i + k) * (ddt_l * way), d_step.to(ddt.dtype.element_ty), t < stored)
            if HAS_Z:
                d_z = d_gate * (skip * input_ + tl.sum(read, 0)) + others[k]
                tl.store(dz_at + (i + k) * (dz_l * way), d_z.to(dz.dtype.element_ty), t < stored)
    _store_by_state(dA_parts + edge, d_A, channel, inside, E, N)
    if HAS_BIAS:
        tl.store(dbias_parts + (row * tiles + tile) * E + channel, d_bias, inside)
