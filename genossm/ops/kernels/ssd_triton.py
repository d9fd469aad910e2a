"""The state-space dual in Triton: matrix products inside chunks, a scan of the states between them.

Mamba-2, section 6, with its adjoint. With r[i] the sum of the chunk's log decays up to position i and x'[j] =
dt[j] x[j], a chunk that the state H enters and the state H' leaves gives, for j <= i,

    y[i] = sum_j (C[i] . B[j]) exp(r[i] - r[j]) x'[j] + exp(r[i]) H C[i]
    H'   = exp(r[last]) H + sum_j exp(r[last] - r[j]) x'[j] B[j]^T

A count of the dropped states that a chunk has met says which positions see one another: those with equal counts; H
reaches count 0 alone. Positions are counted in the order of the scan, so that `reverse` turns an index and no tensor.
What is one number a head and position (dt, r, counts) is made by torch, whose autograd turns the gradient of r into
those of dt, its bias and A. The backward pass makes the states again from the inputs.

Nothing is summed by atomics: results repeat bit by bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.kernels import ssd_torch
from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch
from genossm.ops.rows import dropped_states, real_positions

_CHUNK = 64
"""Positions of a chunk."""
_WIDEST = 128
"""Heads that are wider go through plain torch."""
_TOGETHER = 16
"""Chunks that the scan over them takes at once."""
# A length needs no code of its own: neighbouring threads hold neighbouring channels or states.
_jit = triton.jit(do_not_specialize=["L", "K"])


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None = None,
    z_BLHP: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BHPN: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan in chunks; see `genossm.ops.ssd.ssd`."""
    if x_BLHP.shape[3] > _WIDEST:
        return ssd_torch.ssd(
            *(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, z_BLHP, dt_bias_H),
            dt_softplus=dt_softplus,
            initial_state_BHPN=initial_state_BHPN,
            return_state=return_state,
            reverse=reverse,
            lengths_B=lengths_B,
            resets_BL=resets_BL,
        )
    dt = dt_BLH.float() if dt_bias_H is None else dt_BLH.float() + dt_bias_H.float()
    dt = F.softplus(dt) if dt_softplus else dt
    real_BL = real_positions(lengths_B, x_BLHP.shape[1])
    x = x_BLHP
    if real_BL is not None:
        # A step of size 0 leaves the state as it is, whatever stands in the padding.
        dt = torch.where(real_BL[..., None], dt, 0.0)
        x = torch.where(real_BL[..., None, None], x, 0.0)
    dt_BHL, reach_BHL, met_BL = _reach(dt, A_H.float(), dropped_states(resets_BL, lengths_B, reverse), reverse)
    y, state_BHPN = _Chunks.apply(reverse, met_BL, x, dt_BHL, reach_BHL, B_BLGN, C_BLGN, initial_state_BHPN)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).float() * x
    if z_BLHP is not None:
        y = y * F.silu(z_BLHP.float())
    if real_BL is not None:
        y = torch.where(real_BL[..., None, None], y, 0.0)
    y = y.to(x_BLHP.dtype)
    return (y, state_BHPN) if return_state else y


def _reach(dt: Tensor, A: Tensor, drop_BL: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dt, summed log decays and drop counts in the order of the scan, the last chunk filled up with zeros."""
    missing = -dt.shape[1] % _CHUNK
    dt = dt.transpose(1, 2)
    dt_BHL = F.pad(dt.flip(2) if reverse else dt, (0, missing)).contiguous()
    log_decay = dt_BHL * A[:, None]
    met_BL = None
    if drop_BL is not None:
        drop_BL = F.pad(drop_BL.flip(1) if reverse else drop_BL, (0, missing))
        # A dropped state has no decay; the counts keep it out.
        log_decay = torch.where(drop_BL[:, None], 0.0, log_decay)
        met_BL = drop_BL.int().unflatten(1, (-1, _CHUNK)).cumsum(2).int().flatten(1).contiguous()
    reach_BHL = log_decay.unflatten(2, (-1, _CHUNK)).cumsum(3).flatten(2)
    return dt_BHL, reach_BHL.contiguous(), met_BL


@triton.jit
def _dot(a, b, HALF: tl.constexpr):
    """Multiply matrices: in bfloat16 on the matrix units, or in three such products of float32's parts."""
    if HALF:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _rows(pointer, t, seen, t_stride, column, columns, c_stride):
    """Load [positions, columns] as float32, 0 where not seen."""
    at = pointer + t.to(tl.int64)[:, None] * t_stride + column[None, :] * c_stride
    return tl.load(at, seen[:, None] & (column < columns)[None, :], 0.0).to(tl.float32)


@triton.jit
def _times(L, Q: tl.constexpr, REVERSE: tl.constexpr):
    """Return the places in memory of this program's chunk, in the order of the scan, and which are in the row."""
    s = tl.program_id(0) * Q + tl.arange(0, Q)
    return (L - 1 - s if REVERSE else s), s < L


@triton.jit
def _small(dt, reach, met, row, head, H, S, Q: tl.constexpr, HAS_MET: tl.constexpr):
    """Load a chunk's dt, summed log decays, their last, and the decays to its end and from its start."""
    s = tl.program_id(0) * Q + tl.arange(0, Q)
    at = (row * H + head) * S
    step = tl.load(dt + at + s)
    r = tl.load(reach + at + s)
    last = tl.load(reach + at + tl.program_id(0) * Q + Q - 1)
    to_end = tl.exp(last - r)
    from_start = tl.exp(r)
    kept = tl.exp(last)
    m = s * 0
    if HAS_MET:
        m = tl.load(met + row * S + s)
        m_last = tl.load(met + row * S + tl.program_id(0) * Q + Q - 1)
        to_end = tl.where(m == m_last, to_end, 0.0)
        from_start = tl.where(m == 0, from_start, 0.0)
        kept = tl.where(m_last == 0, kept, 0.0)
    return step, r, m, to_end, from_start, kept


@triton.jit
def _between(r, m, Q: tl.constexpr, HAS_MET: tl.constexpr):
    """Return what position i keeps of what position j added, 0 where it sees none of it."""
    q = tl.arange(0, Q)
    seen = q[:, None] >= q[None, :]
    if HAS_MET:
        seen = seen & (m[:, None] == m[None, :])
    # Above the diagonal the difference is positive and might overflow.
    return tl.where(seen, tl.exp(tl.where(seen, r[:, None] - r[None, :], 0.0)), 0.0)


@_jit
def _added(
    value, W, dt, reach, met, state, kept_out, L, S, H, G, P, N, K, v_b, v_l, v_h, v_p, w_b, w_l, w_g, w_n,
    ADJOINT: tl.constexpr, REVERSE: tl.constexpr, HAS_MET: tl.constexpr, HALF: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute what a chunk adds to the state that leaves it, or of dy and C to the gradient of the one that enters."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    t, inside = _times(L, Q, REVERSE)
    step, _, _, to_end, from_start, kept = _small(dt, reach, met, row, head, H, S, Q, HAS_MET)
    p = tl.arange(0, BP)
    weight = from_start if ADJOINT else to_end * step
    v = _rows(value + row * v_b + head * v_h, t, inside, v_l, p, P, v_p) * weight[:, None]
    at = ((row * H + head) * K + tl.program_id(0)) * P * N
    tl.store(kept_out + (row * H + head) * K + tl.program_id(0), kept)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        w = _rows(W + row * w_b + head // (H // G) * w_g, t, inside, w_l, n, N, w_n)
        total = _dot(tl.trans(v), w, HALF)
        tl.store(state + at + p[:, None] * N + n[None, :], total, (p < P)[:, None] & (n < N)[None, :])


@triton.jit
def _then(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@_jit
def _chain(
    state, kept, first, last, width, K, HAS_FIRST: tl.constexpr, BACKWARD: tl.constexpr, WIDTH: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Scan over the chunks of one head, in place: what each adds becomes what enters it (from behind if BACKWARD)."""
    head = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < width
    carried = tl.zeros([WIDTH], tl.float32)
    if HAS_FIRST:
        carried = tl.load(first + head * width + lane, inside, 0.0)
    u = tl.arange(0, U)[:, None]
    for k0 in range(0, K, U):
        k = k0 + u
        chunk = K - 1 - k if BACKWARD else k
        real = (k < K) & inside[None, :]
        at = state + (head * K + chunk).to(tl.int64) * width + lane[None, :]
        own = tl.load(at, real, 0.0)
        a = tl.load(kept + head * K + chunk, k < K, 1.0) + tl.zeros([U, WIDTH], tl.float32)
        through, x = tl.associative_scan((a, own), 0, _then)
        x = x + through * carried[None, :]
        # What enters the next chunk is what leaves this one; both are undone from the same two numbers.
        before = tl.gather(x, tl.maximum(u - 1, 0) + tl.zeros([U, WIDTH], tl.int32), 0)
        tl.store(at, tl.where(u == 0, carried[None, :], before), real)
        carried = tl.sum(tl.where(u == U - 1, x, 0.0), 0)
    tl.store(last + head * width + lane, carried, inside)


@_jit
def _outputs(
    x, B, C, dt, reach, met, state, y, L, S, H, G, P, N, K, x_b, x_l, x_h, x_p, b_b, b_l, b_g, b_n, c_b, c_l, c_g, c_n,
    REVERSE: tl.constexpr, HAS_MET: tl.constexpr, HALF: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of one chunk of one head."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    t, inside = _times(L, Q, REVERSE)
    step, r, m, _, from_start, _ = _small(dt, reach, met, row, head, H, S, Q, HAS_MET)
    p = tl.arange(0, BP)
    scores = tl.zeros([Q, Q], tl.float32)
    out = tl.zeros([Q, BP], tl.float32)
    at = state + ((row * H + head) * K + tl.program_id(0)) * P * N
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        b = _rows(B + row * b_b + group * b_g, t, inside, b_l, n, N, b_n)
        c = _rows(C + row * c_b + group * c_g, t, inside, c_l, n, N, c_n)
        h = tl.load(at + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :], 0.0)
        scores += _dot(c, tl.trans(b), HALF)
        out += _dot(c * from_start[:, None], tl.trans(h), HALF)
    value = _rows(x + row * x_b + head * x_h, t, inside, x_l, p, P, x_p) * step[:, None]
    out += _dot(scores * _between(r, m, Q, HAS_MET), value, HALF)
    to = y + ((row * L + t.to(tl.int64)) * H + head)[:, None] * P + p[None, :]
    tl.store(to, out, inside[:, None] & (p < P)[None, :])


@_jit
def _input_gradients(
    x, B, C, dy, dt, reach, met, state, adjoint, dx, ddt, dreach, L, S, H, G, P, N, K,
    x_b, x_l, x_h, x_p, b_b, b_l, b_g, b_n, c_b, c_l, c_g, c_n, y_b, y_l, y_h, y_p,
    REVERSE: tl.constexpr, HAS_MET: tl.constexpr, HALF: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x, dt and the summed log decays in one chunk of one head."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    t, inside = _times(L, Q, REVERSE)
    step, r, m, to_end, from_start, kept = _small(dt, reach, met, row, head, H, S, Q, HAS_MET)
    p = tl.arange(0, BP)
    own = _rows(x + row * x_b + head * x_h, t, inside, x_l, p, P, x_p)
    grad = _rows(dy + row * y_b + head * y_h, t, inside, y_l, p, P, y_p)
    scores = tl.zeros([Q, Q], tl.float32)
    d_value = tl.zeros([Q, BP], tl.float32)
    read = tl.zeros([Q, BP], tl.float32)
    stays = 0.0
    at = ((row * H + head) * K + tl.program_id(0)) * P * N
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        b = _rows(B + row * b_b + group * b_g, t, inside, b_l, n, N, b_n)
        c = _rows(C + row * c_b + group * c_g, t, inside, c_l, n, N, c_n)
        real = (p < P)[:, None] & (n < N)[None, :]
        h = tl.load(state + at + p[:, None] * N + n[None, :], real, 0.0)
        g = tl.load(adjoint + at + p[:, None] * N + n[None, :], real, 0.0)
        scores += _dot(c, tl.trans(b), HALF)
        read += _dot(c, tl.trans(h), HALF)
        d_value += _dot(b, tl.trans(g), HALF)
        stays += tl.sum(tl.sum(h * g, 1), 0)
    d_value = d_value * to_end[:, None]
    leaves = tl.sum(d_value * own, 1) * step
    enters = tl.sum(read * grad, 1) * from_start
    seen = scores * _between(r, m, Q, HAS_MET)
    pairs = seen * _dot(grad, tl.trans(own * step[:, None]), HALF)
    d_value += _dot(tl.trans(seen), grad, HALF)
    q = tl.arange(0, Q)
    d_r = tl.sum(pairs, 1) - tl.sum(pairs, 0) + enters - leaves
    d_r += tl.where(q == Q - 1, tl.sum(leaves, 0) + kept * stays, 0.0)
    s = (row * H + head) * S + tl.program_id(0) * Q + q
    tl.store(dreach + s, d_r)
    tl.store(ddt + s, tl.sum(d_value * own, 1))
    to = dx + ((row * L + t.to(tl.int64)) * H + head)[:, None] * P + p[None, :]
    tl.store(to, (d_value * step[:, None]).to(dx.dtype.element_ty), inside[:, None] & (p < P)[None, :])


@_jit
def _group_gradients(
    x, B, C, dy, dt, reach, met, state, adjoint, dB, dC, L, S, H, G, P, N, K,
    x_b, x_l, x_h, x_p, b_b, b_l, b_g, b_n, c_b, c_l, c_g, c_n, y_b, y_l, y_h, y_p, tiles,
    REVERSE: tl.constexpr, HAS_MET: tl.constexpr, HALF: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of B and C in one chunk, for one group and one tile of states: sums over its heads."""
    group = tl.program_id(1) // tiles
    n = tl.program_id(1) % tiles * BN + tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    t, inside = _times(L, Q, REVERSE)
    p = tl.arange(0, BP)
    b = _rows(B + row * b_b + group * b_g, t, inside, b_l, n, N, b_n)
    c = _rows(C + row * c_b + group * c_g, t, inside, c_l, n, N, c_n)
    d_b = tl.zeros([Q, BN], tl.float32)
    d_c = tl.zeros([Q, BN], tl.float32)
    real = (p < P)[:, None] & (n < N)[None, :]
    for index in range(H // G):
        head = group * (H // G) + index
        step, r, m, to_end, from_start, _ = _small(dt, reach, met, row, head, H, S, Q, HAS_MET)
        value = _rows(x + row * x_b + head * x_h, t, inside, x_l, p, P, x_p) * step[:, None]
        grad = _rows(dy + row * y_b + head * y_h, t, inside, y_l, p, P, y_p)
        at = ((row * H + head) * K + tl.program_id(0)) * P * N
        h = tl.load(state + at + p[:, None] * N + n[None, :], real, 0.0)
        g = tl.load(adjoint + at + p[:, None] * N + n[None, :], real, 0.0)
        pairs = _dot(grad, tl.trans(value), HALF) * _between(r, m, Q, HAS_MET)
        d_c += _dot(pairs, b, HALF) + _dot(grad * from_start[:, None], h, HALF)
        d_b += _dot(tl.trans(pairs), c, HALF) + _dot(value * to_end[:, None], g, HALF)
    to = ((row * L + t.to(tl.int64)) * G + group)[:, None] * N + n[None, :]
    kept = inside[:, None] & (n < N)[None, :]
    tl.store(dB + to, d_b.to(dB.dtype.element_ty), kept)
    tl.store(dC + to, d_c.to(dC.dtype.element_ty), kept)


@together
class _Chunks(torch.autograd.Function):
    """The kernels with their own backward; only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, met_BL: Tensor | None, *inputs: Any) -> Any:
        x, dt, reach, B, C, initial = inputs
        batch, length, heads, width = x.shape
        shape = _shape(x, B, reach, met_BL, reverse)
        first = None if initial is None else initial.float().contiguous()
        state, last = _states(x, B, dt, reach, met_BL, first, shape)
        y = torch.empty(batch, length, heads, width, device=x.device)
        grid = (reach.shape[2] // _CHUNK, heads, batch)
        strides = (*x.stride(), *B.stride(), *C.stride())
        launch(_outputs, grid, (x, B, C, dt, reach, met_BL, state, y), (*shape.sizes, *strides), **shape.flags)
        ctx.shape, ctx.met_BL = shape, met_BL
        ctx.save_for_backward(*inputs)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, met_BL = ctx.shape, ctx.met_BL
        x, dt, reach, B, C, initial = ctx.saved_tensors
        batch, length, heads, width = x.shape
        dy = grads[0]
        first = None if initial is None else initial.float().contiguous()
        state, _ = _states(x, B, dt, reach, met_BL, first, shape)
        adjoint, dfirst = _states(dy, C, dt, reach, met_BL, grads[1].float().contiguous(), shape, adjoint=True)
        dx = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
        dB, dC = (
            torch.empty(B.shape, dtype=B.dtype, device=x.device),
            torch.empty(C.shape, dtype=C.dtype, device=x.device),
        )
        ddt, dreach = torch.empty_like(dt), torch.empty_like(reach)
        tiles = triton.cdiv(B.shape[3], shape.flags["BN"])
        chunks = reach.shape[2] // _CHUNK
        given = (x, B, C, dy, dt, reach, met_BL, state, adjoint)
        strides = (*x.stride(), *B.stride(), *C.stride(), *dy.stride())
        numbers = (*shape.sizes, *strides)
        launch(_input_gradients, (chunks, heads, batch), (*given, dx, ddt, dreach), numbers, **shape.flags)
        grid = (chunks, B.shape[2] * tiles, batch)
        launch(_group_gradients, grid, (*given, dB, dC), (*numbers, tiles), **shape.flags)
        dinitial = None if initial is None else dfirst.to(initial.dtype)
        return None, None, dx, ddt, dreach, dB, dC, dinitial


class _Shape:
    """What every kernel is told of the shapes: sizes, and flags that it is compiled for."""

    def __init__(self, sizes: tuple[int, ...], flags: dict[str, Any]):
        self.sizes, self.flags = sizes, flags


def _shape(x: Tensor, B: Tensor, reach: Tensor, met_BL: Tensor | None, reverse: bool) -> _Shape:
    _, length, heads, width = x.shape
    groups, states = B.shape[2:]
    positions = reach.shape[2]
    # Triton's interpreter, which takes CPU tensors, has no products of bfloat16.
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    roomy = _roomy(x.device)
    return _Shape(
        (length, positions, heads, groups, width, states, positions // _CHUNK),
        {
            "REVERSE": reverse,
            "HAS_MET": met_BL is not None,
            "HALF": half,
            "Q": _CHUNK,
            "BP": max(16, triton.next_power_of_2(width)),
            "BN": min(64 if roomy else 16, max(16, triton.next_power_of_2(states))),
            # Four warps run out of registers over 16 bit inputs, and on an H200 the gradient of C in tiles of 16 or 32
            # states then came out wrong, by a tenth, or the kernel read beyond its memory (Triton 3.6); eight hold.
            "num_warps": 4 if roomy and not half else 8,
            # Tiles that are loaded ahead of their turn would not fit a multiprocessor's shared memory.
            "num_stages": 1,
        },
    )


def _roomy(device: torch.device) -> bool:
    """Tell whether tiles of 64 states fit a GPU's shared memory, up to 192 KiB in float32; those of 16 take half."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 192 << 10


def _states(
    value: Tensor,
    weight: Tensor,
    dt: Tensor,
    reach: Tensor,
    met_BL: Tensor | None,
    first: Tensor | None,
    shape: _Shape,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the state that enters each chunk, (B, H, K, P, N), and the last; or the adjoint's, from behind."""
    _, _, heads, _, width, states, chunks = shape.sizes
    batch = value.shape[0]
    state = torch.empty(batch, heads, chunks, width, states, device=value.device)
    kept = torch.empty(batch, heads, chunks, device=value.device)
    last = torch.empty(batch, heads, width, states, device=value.device)
    strides = (*value.stride(), *weight.stride())
    given = (value, weight, dt, reach, met_BL, state, kept)
    launch(_added, (chunks, heads, batch), given, (*shape.sizes, *strides), ADJOINT=adjoint, **shape.flags)
    lanes = min(128, triton.next_power_of_2(width * states))
    launch(
        _chain,
        (triton.cdiv(width * states, lanes), batch * heads),
        (state, kept, first, last),
        (width * states, chunks),
        HAS_FIRST=first is not None,
        BACKWARD=adjoint,
        WIDTH=lanes,
        U=_TOGETHER,
    )
    return state, last
