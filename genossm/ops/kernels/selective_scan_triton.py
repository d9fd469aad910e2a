"""The selective scan in Triton: every tile of the sequence runs at once, so that one long row fills a GPU.

The sequence is cut into tiles of T positions. Forward: (1) the state that each tile would leave behind from a zero
start is a weighted sum over its positions, no scan; (2) a scan over tiles, on these sums alone, gives the state that
enters each; (3) each tile is scanned from there. Backward needs the inputs and the entering states: (1) and (2) again
for the adjoint state, which runs the other way, then both scans inside each tile. A thread holds 8 consecutive
positions and scans them in registers; threads exchange one (decay, state) pair for the 8.

With a[t] = exp(dt[t] A): h[t] = a[t] h[t-1] + dt[t] u[t] B[t] and its adjoint g[t] = dy[t] C[t] + a[t+1] g[t+1]. What
passes from tile to tile is h at the tile's last position and a g at its first one (mirrored where `reverse`).

Nothing is summed by atomics: sums over channels and tiles are written in parts and added in a fixed order, so that
results repeat bit by bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels import selective_scan_torch
from genossm.ops.kernels.triton_parts import add_by_run, empty_like, join_runs, load_tile, sigmoid, softplus, split_runs
from genossm.ops.rows import dropped_states

_LOG2E = tl.constexpr(1.4426950408889634)
_PARTS_BYTES = 1 << 28
"""Memory for the parts of the gradients of B and C: longer sequences go through the last kernel in pieces."""


@triton.jit
def _then(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _place(E, L, groups, first_tile, BD: tl.constexpr, T: tl.constexpr):
    """Return row, tile, channels and first position of a program; neighbours in the grid share a tile's B and C."""
    tile = first_tile + tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * BD + tl.arange(0, BD)
    return tl.program_id(1).to(tl.int64), tile, channel, tile.to(tl.int64) * T


@triton.jit
def _seen(lengths, row, channel, start, E, L, HAS_LENGTHS: tl.constexpr, T: tl.constexpr):
    """Return which elements of a tile are real; loads outside them give 0."""
    end = tl.minimum(tl.load(lengths + row), L) if HAS_LENGTHS else L
    return (channel < E)[:, None] & ((start + tl.arange(0, T)) < end)[None, :]


@triton.jit
def _steps(dt, seen, bias, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    raw = dt + bias
    steps = softplus(raw) if SOFTPLUS else raw
    return steps if EVEN else tl.where(seen, steps, 0.0)


@triton.jit
def _edges(
    x, dt, z, W, A, bias, drop, lengths, edge, decay,
    E, L, tiles, groups, x_b, x_l, x_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, w_b, w_l, w_n,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, HAS_DROP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ADJOINT: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Compute what each tile passes on from a zero start: of x = u and W = B, or for the adjoint x = dy and W = C."""
    row, tile, channel, start = _place(E, L, groups, 0, BD, T)
    seen = _seen(lengths, row, channel, start, E, L, HAS_LENGTHS, T)
    inside = channel < E
    i = tl.arange(0, T)[None, :]
    rate_bias = tl.load(bias + channel, inside, 0.0)[:, None] if HAS_BIAS else 0.0
    step = load_tile(dt + row * dt_b + channel.to(tl.int64) * dt_e + start * dt_l, i * dt_l, seen, EVEN)
    step = _steps(step, seen, rate_bias, SOFTPLUS, EVEN)
    value = load_tile(x + row * x_b + channel.to(tl.int64) * x_e + start * x_l, i * x_l, seen, EVEN)
    if ADJOINT:
        if HAS_Z:
            gate = load_tile(z + row * z_b + channel.to(tl.int64) * z_e + start * z_l, i * z_l, seen, EVEN)
            value = value * gate * sigmoid(gate)
    else:
        value = value * step
    # The decays between a position and the edge: the sum of the steps after it, or up to it. An adjoint state takes
    # the decay of its own position along.
    SUFFIX: tl.constexpr = ADJOINT == REVERSE
    # It is summed from the edge, for the positions near it are those whose error would be seen.
    passed = tl.cumsum(step, 1, reverse=SUFFIX)
    whole = tl.sum(step, 1)
    way = passed if ADJOINT else passed - step
    if HAS_DROP:
        cut = tl.load(drop + row * L + start + i, (start + i) < L, 0).to(tl.int32)
        cuts = tl.cumsum(cut, 1, reverse=SUFFIX)
        total = tl.sum(cut, 1)
        crossed = cuts if ADJOINT else cuts - cut
        value = tl.where(crossed == 0, value, 0.0)
        # Not a number marks a tile that nothing passes through.
        whole = tl.where(total > 0, float("nan"), whole)
    at = (row * tiles + tile) * E + channel
    tl.store(decay + at, whole, inside)
    for n in range(N):
        rate = tl.load(A + channel * N + n, inside, 0.0)[:, None] * _LOG2E
        w = load_tile(W + row * w_b + n * w_n + start * w_l + channel * 0, i * w_l, seen, EVEN)
        tl.store(edge + at * N + n, tl.sum(tl.exp2(way * rate) * (value * w), 1), inside)


@triton.jit
def _chain(
    edge, decay, A, first, entering, last, E, tiles, N: tl.constexpr, HAS_FIRST: tl.constexpr,
    LEFTWARD: tl.constexpr, WIDTH: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Scan over tiles: what enters each of them and what leaves the last one. One lane is one (channel, state)."""
    row = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < E * N
    rate = tl.load(A + lane, inside, 0.0) * _LOG2E
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
        span = tl.load(decay + at + (lane // N)[None, :], real, 0.0)
        a = tl.where(span == span, tl.exp2(rate[None, :] * span), 0.0)
        x = tl.load(edge + at * N + lane[None, :], real, 0.0)
        a, x = tl.associative_scan((a, x), 0, _then)
        x = x + a * carried[None, :]
        after = -1 if LEFTWARD else 1
        tl.store(entering + (row * tiles + tile + after) * E * N + lane[None, :], x, real & (k + 1 < tiles))
        carried = tl.sum(tl.where(u == U - 1, x, 0.0), 0)
    tl.store(last + row * E * N + lane, carried, inside)


@triton.jit
def _carry(decay, state, first, LEFTWARD: tl.constexpr, BD: tl.constexpr, G: tl.constexpr):
    """Scan over the runs of a tile: the state that enters each run, from (decay, state) of each and the tile's."""
    run = tl.arange(0, G)[None, :] + tl.zeros([BD, G], tl.int32)
    if LEFTWARD:
        # A mirrored forward scan costs fewer exchanges than Triton's own reverse one.
        decay, state = tl.gather(decay, G - 1 - run, 1), tl.gather(state, G - 1 - run, 1)
    decay, state = tl.associative_scan((decay, state), 1, _then)
    state = state + decay * first
    before = tl.maximum(G - 2 - run, 0) if LEFTWARD else tl.maximum(run - 1, 0)
    begins = run == G - 1 if LEFTWARD else run == 0
    return tl.where(begins, first, tl.gather(state, before, 1))


@triton.jit
def _decays(step, keep, rate, HAS_DROP: tl.constexpr):
    """Return the decay of each of a run's 8 positions and of the whole run."""
    decay = ()
    whole = step[0]
    kept = keep[0]
    for k in tl.static_range(8):
        a = tl.exp2(step[k] * rate)
        decay += (a * keep[k] if HAS_DROP else a,)
        if k > 0:
            whole += step[k]
            kept *= keep[k]
    run = tl.exp2(whole * rate)
    return decay, run * kept if HAS_DROP else run


@triton.jit
def _keep(drop, row, start, i, L, step, HAS_DROP: tl.constexpr, BD: tl.constexpr, G: tl.constexpr):
    if HAS_DROP:
        cut = tl.load(drop + row * L + start + i, (start + i) < L, 0) + tl.zeros([BD, G * 8], tl.int8)
        return split_runs(tl.where(cut == 0, 1.0, 0.0), BD, G)
    return step


@triton.jit
def _states(decay, whole, enters, first, REVERSE: tl.constexpr, BD: tl.constexpr, G: tl.constexpr):
    """Return the states at a run's 8 positions and the one that enters it."""
    total = enters[7 if REVERSE else 0]
    for j in tl.static_range(1, 8):
        total = decay[7 - j if REVERSE else j] * total + enters[7 - j if REVERSE else j]
    before = _carry(whole, total, first, REVERSE, BD, G)
    state = before
    states = ()
    for j in tl.static_range(8):
        state = decay[7 - j if REVERSE else j] * state + enters[7 - j if REVERSE else j]
        states = (state,) + states if REVERSE else states + (state,)
    return states, before


@triton.jit
def _forward(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, y,
    E, L, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, b_b, b_l, b_n, c_b, c_l, c_n, y_b, y_l, y_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
    BD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = G * 8
    row, tile, channel, start = _place(E, L, groups, 0, BD, T)
    seen = _seen(lengths, row, channel, start, E, L, HAS_LENGTHS, T)
    inside = channel < E
    wide = channel.to(tl.int64)
    i = tl.arange(0, T)[None, :]
    rate_bias = tl.load(bias + channel, inside, 0.0)[:, None] if HAS_BIAS else 0.0
    u_tile = load_tile(u + row * u_b + wide * u_e + start * u_l, i * u_l, seen, EVEN)
    steps = load_tile(dt + row * dt_b + wide * dt_e + start * dt_l, i * dt_l, seen, EVEN)
    steps = _steps(steps, seen, rate_bias, SOFTPLUS, EVEN)
    skip = tl.load(D + channel, inside, 0.0)[:, None] * u_tile if HAS_D else u_tile * 0.0
    step = split_runs(steps, BD, G)
    value = split_runs(steps * u_tile, BD, G)
    out = split_runs(skip, BD, G)
    keep = _keep(drop, row, start, i, L, step, HAS_DROP, BD, G)
    at = ((row * tiles + tile) * E + channel) * N
    for n in range(N):
        rate = tl.load(A + channel * N + n, inside, 0.0)[:, None] * _LOG2E
        first = tl.load(entering + at + n, inside, 0.0)[:, None]
        b = split_runs(load_tile(B + row * b_b + n * b_n + start * b_l + channel * 0, i * b_l, seen, EVEN), BD, G)
        c = split_runs(load_tile(C + row * c_b + n * c_n + start * c_l + channel * 0, i * c_l, seen, EVEN), BD, G)
        decay, whole = _decays(step, keep, rate, HAS_DROP)
        enters = ()
        for k in tl.static_range(8):
            enters += (value[k] * b[k],)
        states, _ = _states(decay, whole, enters, first, REVERSE, BD, G)
        added = ()
        for k in tl.static_range(8):
            added += (out[k] + c[k] * states[k],)
        out = added
    result = join_runs(out, BD, G)
    if HAS_Z:
        gate = load_tile(z + row * z_b + wide * z_e + start * z_l, i * z_l, seen, EVEN)
        result = result * gate * sigmoid(gate)
    pointer = y + (row * y_b + wide * y_e + start * y_l)[:, None] + i * y_l
    if EVEN:
        tl.store(pointer, result.to(y.dtype.element_ty))
    else:
        kept = inside[:, None] & (start + i < L)
        tl.store(pointer, tl.where(seen, result, 0.0).to(y.dtype.element_ty), kept)


@triton.jit
def _backward(
    u, dt, z, B, C, A, D, bias, drop, lengths, entering, adjoint, dy, du, ddt, dz, dA_parts, dB_parts, dC_parts,
    dD_parts, dbias_parts, first_tile, piece,
    E, L, tiles, groups, u_b, u_l, u_e, dt_b, dt_l, dt_e, z_b, z_l, z_e, b_b, b_l, b_n, c_b, c_l, c_n, dy_b, dy_l, dy_e,
    o_b, o_l, o_e,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DROP: tl.constexpr, HAS_LENGTHS: tl.constexpr, REVERSE: tl.constexpr, EVEN: tl.constexpr,
    BD: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = G * 8
    row, tile, channel, start = _place(E, L, groups, first_tile, BD, T)
    seen = _seen(lengths, row, channel, start, E, L, HAS_LENGTHS, T)
    inside = channel < E
    wide = channel.to(tl.int64)
    i = tl.arange(0, T)[None, :]
    rate_bias = tl.load(bias + channel, inside, 0.0)[:, None] if HAS_BIAS else 0.0
    u_at = u + row * u_b + wide * u_e + start * u_l
    dt_at = dt + row * dt_b + wide * dt_e + start * dt_l
    dy_at = dy + row * dy_b + wide * dy_e + start * dy_l
    steps = _steps(load_tile(dt_at, i * dt_l, seen, EVEN), seen, rate_bias, SOFTPLUS, EVEN)
    dy_tile = load_tile(dy_at, i * dy_l, seen, EVEN)
    if HAS_Z:
        z_at = z + row * z_b + wide * z_e + start * z_l
        gate = load_tile(z_at, i * z_l, seen, EVEN)
        dy_tile = dy_tile * gate * sigmoid(gate)
    step = split_runs(steps, BD, G)
    value = split_runs(steps * load_tile(u_at, i * u_l, seen, EVEN), BD, G)
    grad = split_runs(dy_tile, BD, G)
    keep = _keep(drop, row, start, i, L, step, HAS_DROP, BD, G)
    zero = tl.zeros([BD, G], tl.float32)
    out = (zero, zero, zero, zero, zero, zero, zero, zero)
    d_value = out
    d_step = out
    at = ((row * tiles + tile) * E + channel) * N
    # Parts of the gradients of B and C lie as (row, group, state, position within the piece).
    parts_at = ((row * groups + tl.program_id(0) % groups) * N) * piece + (tile - first_tile) * T + tl.arange(0, T)
    for n in range(N):
        A_n = tl.load(A + channel * N + n, inside, 0.0)[:, None]
        rate = A_n * _LOG2E
        first = tl.load(entering + at + n, inside, 0.0)[:, None]
        b = split_runs(load_tile(B + row * b_b + n * b_n + start * b_l + channel * 0, i * b_l, seen, EVEN), BD, G)
        c = split_runs(load_tile(C + row * c_b + n * c_n + start * c_l + channel * 0, i * c_l, seen, EVEN), BD, G)
        decay, whole = _decays(step, keep, rate, HAS_DROP)
        enters = ()
        read = ()
        for k in tl.static_range(8):
            enters += (value[k] * b[k],)
            read += (grad[k] * c[k],)
        states, before = _states(decay, whole, enters, first, REVERSE, BD, G)
        d_c = ()
        added = ()
        for k in tl.static_range(8):
            added += (out[k] + c[k] * states[k],)
            d_c += (tl.sum(grad[k] * states[k], 0),)
        out = added
        tl.store(dC_parts + parts_at + n * piece, add_by_run(d_c, G).to(dC_parts.dtype.element_ty))
        # The adjoint times its own decay, a g, runs the other way.
        total = decay[0 if REVERSE else 7] * read[0 if REVERSE else 7]
        for j in tl.static_range(1, 8):
            total = decay[j if REVERSE else 7 - j] * (read[j if REVERSE else 7 - j] + total)
        passed = _carry(whole, total, tl.load(adjoint + at + n, inside, 0.0)[:, None], not REVERSE, BD, G)
        d_b = ()
        values = ()
        rises = ()
        d_A = zero
        for j in tl.static_range(8):
            g = read[j if REVERSE else 7 - j] + passed
            passed = decay[j if REVERSE else 7 - j] * g
            through = passed * (before if j == 7 else states[j + 1 if REVERSE else 6 - j])
            d_A += through * step[j if REVERSE else 7 - j]
            part = (tl.sum(g * value[j if REVERSE else 7 - j], 0),)
            risen = (d_value[j if REVERSE else 7 - j] + g * b[j if REVERSE else 7 - j],)
            rise = (d_step[j if REVERSE else 7 - j] + through * A_n,)
            d_b = d_b + part if REVERSE else part + d_b
            values = values + risen if REVERSE else risen + values
            rises = rises + rise if REVERSE else rise + rises
        d_value = values
        d_step = rises
        tl.store(dB_parts + parts_at + n * piece, add_by_run(d_b, G).to(dB_parts.dtype.element_ty))
        tl.store(dA_parts + at + n, tl.sum(d_A, 1), inside)
    stored = inside[:, None] & (start + i < L)
    skip = tl.load(D + channel, inside, 0.0)[:, None] if HAS_D else 0.0
    u_tile = load_tile(u_at, i * u_l, seen, EVEN)
    dy_tile = join_runs(grad, BD, G)
    d_value_tile = join_runs(d_value, BD, G)
    to = (row * o_b + wide * o_e + start * o_l)[:, None] + i * o_l
    tl.store(du + to, (skip * dy_tile + join_runs(step, BD, G) * d_value_tile).to(du.dtype.element_ty), stored)
    d_dt = d_value_tile * u_tile + join_runs(d_step, BD, G)
    if SOFTPLUS:
        d_dt = d_dt * sigmoid(load_tile(dt_at, i * dt_l, seen, EVEN) + rate_bias)
    if not EVEN:
        d_dt = tl.where(seen, d_dt, 0.0)
    tl.store(ddt + to, d_dt.to(ddt.dtype.element_ty), stored)
    if HAS_Z:
        gate = load_tile(z_at, i * z_l, seen, EVEN)
        s = sigmoid(gate)
        y_tile = join_runs(out, BD, G) + skip * u_tile
        d_z = load_tile(dy_at, i * dy_l, seen, EVEN) * y_tile * s * (1.0 + gate * (1.0 - s))
        tl.store(dz + to, d_z.to(dz.dtype.element_ty), stored)
    channel_at = (row * tiles + tile) * E + channel
    if HAS_D:
        tl.store(dD_parts + channel_at, tl.sum(dy_tile * u_tile, 1), inside)
    if HAS_BIAS:
        tl.store(dbias_parts + channel_at, tl.sum(d_dt, 1), inside)


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    z_BLE: Tensor | None = None,
    dt_bias_E: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BEN: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan as `genossm.ops.selective_scan` describes; time contiguous in memory is the fast case and stays so."""
    given = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, initial_state_BEN)
    if u_BLE.dtype == torch.float64:
        # Double precision is for checking the others; these kernels accumulate in float32.
        return selective_scan_torch.selective_scan(
            *given[:8],
            dt_softplus=dt_softplus,
            initial_state_BEN=initial_state_BEN,
            return_state=return_state,
            reverse=reverse,
            lengths_B=lengths_B,
            resets_BL=resets_BL,
        )
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    rows = (None if drop_BL is None else drop_BL.to(torch.int8).contiguous(), lengths_B)
    y_BLE, state_BEN = _SelectiveScan.apply(*given, *rows, dt_softplus, reverse)
    return (y_BLE, state_BEN) if return_state else y_BLE


class _Plan:
    """The shape of a call: tiles, grids and the arguments that all kernels share."""

    def __init__(self, u: Tensor, N: int, flags: dict[str, bool], lengths: Tensor | None):
        self.batch, self.length, self.width, self.N = *u.shape, N
        # A thread holds two channels; eight or four lanes along time leave four or eight channels to a warp, whose
        # sums over channels are the parts of the gradients of B and C.
        self.BD, self.G = (8, 8) if self.width >= 8 else (4, 16)
        self.T = self.G * 8
        self.tiles, self.groups = triton.cdiv(self.length, self.T), triton.cdiv(self.width, self.BD)
        even = lengths is None and self.length % self.T == 0 and self.width % self.BD == 0
        self.flags = flags | {"EVEN": even}
        self.sizes = (self.width, self.length, self.tiles, self.groups)

    def chain(self, edge: Tensor, decay: Tensor, A: Tensor, first: Tensor | None, leftward: bool) -> tuple[Tensor, ...]:
        entering, last = torch.empty_like(edge), torch.empty_like(edge[:, 0])
        grid = (triton.cdiv(self.width * self.N, 32), self.batch)
        # Many tiles at once hide the latency of a long chain; a short one would only pay for what it lacks.
        rows = 128 if self.tiles > 64 else 32
        _chain[grid](
            edge, decay, A, first, entering, last, self.width, self.tiles,
            N=self.N, HAS_FIRST=first is not None, LEFTWARD=leftward, WIDTH=32, U=rows, num_warps=rows // 32,
        )  # fmt: skip
        return entering, last

    def edges(
        self, x: Tensor, dt: Tensor, z: Tensor | None, W: Tensor, A: Tensor, rest: tuple[Any, ...], adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        edge = torch.empty(self.batch, self.tiles, self.width, self.N, device=x.device)
        decay = torch.empty(self.batch, self.tiles, self.width, device=x.device)
        flags = {name: on for name, on in self.flags.items() if name != "HAS_D"}
        strides = (*x.stride(), *dt.stride(), *_strides(z), *W.stride())
        _edges[(self.tiles * self.groups, self.batch)](
            x, dt, z, W, A, *rest, edge, decay, *self.sizes, *strides,
            N=self.N, ADJOINT=adjoint, BD=self.BD, T=self.T, num_warps=1, **flags,
        )  # fmt: skip
        return edge, decay


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        u, dt, A, B, C, D, z, bias, first, drop, lengths, softplus_on, reverse = given
        A, D, bias, first = (None if x is None else x.float().contiguous() for x in (A, D, bias, first))
        flags = {
            "SOFTPLUS": softplus_on, "HAS_BIAS": bias is not None, "HAS_D": D is not None, "HAS_Z": z is not None,
            "HAS_DROP": drop is not None, "HAS_LENGTHS": lengths is not None, "REVERSE": reverse,
        }  # fmt: skip
        plan = _Plan(u, A.shape[1], flags, lengths)
        rest = (bias, drop, lengths)
        edge, decay = plan.edges(u, dt, None, B, A, rest, adjoint=False)
        entering, last = plan.chain(edge, decay, A, first, leftward=reverse)
        y = empty_like(u)
        strides = (*u.stride(), *dt.stride(), *_strides(z), *B.stride(), *C.stride(), *y.stride())
        _forward[(plan.tiles * plan.groups, plan.batch)](
            u, dt, z, B, C, A, D, *rest, entering, y, *plan.sizes, *strides,
            N=plan.N, BD=plan.BD, G=plan.G, num_warps=1, **plan.flags,
        )  # fmt: skip
        ctx.save_for_backward(u, dt, A, B, C, D, z, *rest, entering, decay)
        ctx.plan, ctx.dtypes = plan, tuple(None if x is None else x.dtype for x in given[:9])
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, bias, drop, lengths, entering, decay = ctx.saved_tensors
        plan, rest = ctx.plan, (bias, drop, lengths)
        dy = torch.zeros_like(u) if grads[0] is None else grads[0]
        edge, _ = plan.edges(dy, dt, z, C, A, rest, adjoint=True)
        last = None if grads[1] is None else grads[1].contiguous()
        adjoint, d_first = plan.chain(edge, decay, A, last, leftward=not plan.flags["REVERSE"])
        du, ddt, dz = empty_like(u), empty_like(u), None if z is None else empty_like(u)
        dD_parts, dbias_parts = (None if x is None else torch.empty_like(decay) for x in (D, bias))
        dB_BNL, dC_BNL = torch.empty(2, plan.batch, plan.N, plan.length, device=u.device)
        # The parts of one piece of the sequence; 16 bit inputs don't deserve 32 bit parts.
        dtype = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32
        a_tile = 2 * plan.batch * plan.groups * plan.N * plan.T * dtype.itemsize
        tiles = max(1, min(plan.tiles, _PARTS_BYTES // a_tile))
        parts = torch.empty(2, plan.batch, plan.groups, plan.N, tiles * plan.T, dtype=dtype, device=u.device)
        strides = [*u.stride(), *dt.stride(), *_strides(z), *B.stride(), *C.stride(), *dy.stride(), *du.stride()]
        for first in range(0, plan.tiles, tiles):
            count = min(tiles, plan.tiles - first)
            _backward[(count * plan.groups, plan.batch)](
                u, dt, z, B, C, A, D, *rest, entering, adjoint, dy, du, ddt, dz, edge, parts[0], parts[1], dD_parts,
                dbias_parts, first, tiles * plan.T, *plan.sizes, *strides,
                N=plan.N, BD=plan.BD, G=plan.G, num_warps=1, **plan.flags,
            )  # fmt: skip
            here = slice(first * plan.T, min(plan.length, (first + count) * plan.T))
            taken = parts[..., : here.stop - here.start]
            torch.sum(taken[0], 1, dtype=torch.float32, out=dB_BNL[..., here])
            torch.sum(taken[1], 1, dtype=torch.float32, out=dC_BNL[..., here])
        found = (
            du, ddt, edge.sum((0, 1)), dB_BNL.transpose(1, 2), dC_BNL.transpose(1, 2),
            None if dD_parts is None else dD_parts.sum((0, 1)), dz,
            None if dbias_parts is None else dbias_parts.sum((0, 1)), d_first,
        )  # fmt: skip
        typed = (None if t is None or x is None else x.to(t) for x, t in zip(found, ctx.dtypes, strict=True))
        return (*typed, None, None, None, None)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
