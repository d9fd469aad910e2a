"""The state-space dual on CPUs: numba kernels on plain threads. Half-precision input is computed in float32.

A CPU gains nothing from the dual's matrix form: with one decay a head the recurrence itself is two fused
multiply-adds a state, where the matrix form takes as many again for each pair of positions inside a chunk (measured:
see docs/results.md). What makes it fast is what makes the selective scan fast (`bodies_numba`), with the states
outermost: a row of states stays in the first-level cache while a chunk's positions go over it.
"""

from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.kernels.bodies_numba import compiled
from genossm.ops.kernels.threads_numba import array, lengths_array, run_shared, threads_for
from genossm.ops.rows import dropped_states, real_positions

_CHUNK = 64
"""Positions between two states that are kept for the backward pass."""
_TILE = 8
"""Positions that the forward pass takes over a row of states at once; it divides _CHUNK."""
_WIDTH = 256
"""Channels of a block, about: whole heads."""

_f = np.float32
_ZERO = _f(0)


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
    """Scan in float32; see `genossm.ops.ssd.ssd`."""
    dt = dt_BLH.float() if dt_bias_H is None else dt_BLH.float() + dt_bias_H.float()
    dt = F.softplus(dt) if dt_softplus else dt
    decay = torch.exp(dt * A_H.float())
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    if drop_BL is not None:
        decay = decay.masked_fill(drop_BL[..., None], 0.0)
    y, state_BHPN = _Scan.apply(reverse, lengths_B, decay, dt, x_BLHP, B_BLGN, C_BLGN, initial_state_BHPN)
    if D is not None:
        y = torch.addcmul(y, (D if D.ndim == 2 else D[:, None]).float(), x_BLHP.float())
    if z_BLHP is not None:
        y = y * F.silu(z_BLHP.float())
    real_BL = real_positions(lengths_B, x_BLHP.shape[1])
    if real_BL is not None:
        y = torch.where(real_BL[..., None, None], y, 0.0)
    y = y.to(x_BLHP.dtype)
    return (y, state_BHPN) if return_state else y


@compiled
@no_type_check
def _forward(decay, dt, x, B, C, lens_B, reverse, save, heads, h0, y, kept, last, job, jobs):
    """Run the scan; `heads` are those of a block, `save` keeps the state before every _CHUNK-th step."""
    batch, _, all_heads, width = x.shape
    groups, states = B.shape[2], B.shape[3]
    a_group = all_heads // groups
    blocks = (a_group + heads - 1) // heads
    keep = np.empty((_TILE, heads * width), _f)
    entering = np.empty((_TILE, heads * width), _f)
    out = np.empty((_TILE, heads * width), _f)
    h = np.empty((states, heads * width), _f)
    for item in range(job, batch * groups * blocks, jobs):
        b, group, block = item // (groups * blocks), item // blocks % groups, item % blocks
        first = group * a_group + block * heads
        count = min(heads, a_group - block * heads)
        w = count * width
        for n in range(states):
            for p in range(count):
                for j in range(width):
                    h[n, p * width + j] = h0[b, n, first + p, j]
        length = lens_B[b]
        for s0 in range(0, length, _TILE):
            if save and s0 % _CHUNK == 0:
                for n in range(states):
                    for p in range(count):
                        for j in range(width):
                            kept[b, s0 // _CHUNK, n, first + p, j] = h[n, p * width + j]
            size = min(_TILE, length - s0)
            for i in range(size):
                t = length - 1 - s0 - i if reverse else s0 + i
                for p in range(count):
                    row, step, stays = x[b, t, first + p], dt[b, t, first + p], decay[b, t, first + p]
                    for j in range(width):
                        keep[i, p * width + j] = stays
                        entering[i, p * width + j] = step * row[j]
                        out[i, p * width + j] = _ZERO
            for n in range(states):
                state = h[n]
                for i in range(size):
                    t = length - 1 - s0 - i if reverse else s0 + i
                    bb, cc = B[b, t, group, n], C[b, t, group, n]
                    stays_w, enters_w, out_w = keep[i], entering[i], out[i]
                    for j in range(w):
                        v = stays_w[j] * state[j] + enters_w[j] * bb
                        state[j] = v
                        out_w[j] += cc * v
            for i in range(size):
                t = length - 1 - s0 - i if reverse else s0 + i
                for p in range(count):
                    row = y[b, t, first + p]
                    for j in range(width):
                        row[j] = out[i, p * width + j]
        for n in range(states):
            for p in range(count):
                for j in range(width):
                    last[b, n, first + p, j] = h[n, p * width + j]


@compiled
@no_type_check
def _backward(decay, dt, x, B, C, lens_B, reverse, heads, kept, dout, dlast, ddecay, ddt, dx, dB, dC, dh0, job, jobs):
    """Run the backward pass, one state after the other over each chunk; dB and dC hold one part a block of heads."""
    batch, _, all_heads, width = x.shape
    groups, states = B.shape[2], B.shape[3]
    a_group = all_heads // groups
    blocks = (a_group + heads - 1) // heads
    keep = np.empty((_CHUNK, heads * width), _f)
    entering = np.empty((_CHUNK, heads * width), _f)
    dy = np.empty((_CHUNK, heads * width), _f)
    dentering = np.empty((_CHUNK, heads * width), _f)
    dkeep = np.empty((_CHUNK, heads * width), _f)
    # State i + 1 is that after step i of the chunk.
    h = np.empty((_CHUNK + 1, heads * width), _f)
    g = np.empty((states, heads * width), _f)
    for item in range(job, batch * groups * blocks, jobs):
        b, group, block = item // (groups * blocks), item // blocks % groups, item % blocks
        first = group * a_group + block * heads
        count = min(heads, a_group - block * heads)
        w = count * width
        for n in range(states):
            for p in range(count):
                for j in range(width):
                    g[n, p * width + j] = dlast[b, n, first + p, j]
        length = lens_B[b]
        for chunk in range((length + _CHUNK - 1) // _CHUNK - 1, -1, -1):
            s0 = chunk * _CHUNK
            size = min(_CHUNK, length - s0)
            for i in range(size):
                t = length - 1 - s0 - i if reverse else s0 + i
                for p in range(count):
                    row, step, stays = x[b, t, first + p], dt[b, t, first + p], decay[b, t, first + p]
                    grad = dout[b, t, first + p]
                    for j in range(width):
                        keep[i, p * width + j] = stays
                        entering[i, p * width + j] = step * row[j]
                        dy[i, p * width + j] = grad[j]
                        dentering[i, p * width + j] = _ZERO
                        dkeep[i, p * width + j] = _ZERO
            for n in range(states):
                for p in range(count):
                    for j in range(width):
                        h[0, p * width + j] = kept[b, chunk, n, first + p, j]
                for i in range(size):
                    t = length - 1 - s0 - i if reverse else s0 + i
                    bb = B[b, t, group, n]
                    before, after, stays_w, enters_w = h[i], h[i + 1], keep[i], entering[i]
                    for j in range(w):
                        after[j] = stays_w[j] * before[j] + enters_w[j] * bb
                adjoint = g[n]
                for i in range(size - 1, -1, -1):
                    t = length - 1 - s0 - i if reverse else s0 + i
                    bb, cc = B[b, t, group, n], C[b, t, group, n]
                    before, after, stays_w, enters_w = h[i], h[i + 1], keep[i], entering[i]
                    dy_w, dkeep_w, denters_w = dy[i], dkeep[i], dentering[i]
                    sum_b = _ZERO
                    sum_c = _ZERO
                    for j in range(w):
                        v = adjoint[j] + cc * dy_w[j]
                        sum_b += v * enters_w[j]
                        sum_c += dy_w[j] * after[j]
                        denters_w[j] += v * bb
                        dkeep_w[j] += v * before[j]
                        adjoint[j] = v * stays_w[j]
                    dB[block, b, t, group, n] = sum_b
                    dC[block, b, t, group, n] = sum_c
            for i in range(size):
                t = length - 1 - s0 - i if reverse else s0 + i
                for p in range(count):
                    row, back, step = x[b, t, first + p], dx[b, t, first + p], dt[b, t, first + p]
                    sum_keep = _ZERO
                    sum_step = _ZERO
                    for j in range(width):
                        back[j] = dentering[i, p * width + j] * step
                        sum_step += dentering[i, p * width + j] * row[j]
                        sum_keep += dkeep[i, p * width + j]
                    ddt[b, t, first + p] = sum_step
                    ddecay[b, t, first + p] = sum_keep
        for n in range(states):
            for p in range(count):
                for j in range(width):
                    dh0[b, n, first + p, j] = g[n, p * width + j]


class _Scan(torch.autograd.Function):
    """h[t] = decay[t] h[t-1] + dt[t] x[t] B[t]^T and y[t] = h[t] C[t]; kept are the inputs and a state a chunk."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, lengths_B: Tensor | None, *inputs: Any) -> Any:
        decay, dt, x, B, C, initial_BHPN = inputs
        batch, length, all_heads, width = x.shape
        groups, states = B.shape[2:]
        save = any(ctx.needs_input_grad)
        heads = max(1, min(all_heads // groups, _WIDTH // width))
        blocks = -(-(all_heads // groups) // heads)
        # Padding is never written, so it has to be 0 from the start.
        y = (torch.empty if lengths_B is None else torch.zeros)(x.shape)
        kept = torch.empty(batch, -(-length // _CHUNK) if save else 0, states, all_heads, width)
        last = torch.empty(batch, states, all_heads, width)
        first = torch.zeros_like(last) if initial_BHPN is None else initial_BHPN.permute(0, 3, 1, 2)
        jobs = threads_for(batch * groups * blocks)
        given = (*map(array, (decay, dt, x, B, C)), lengths_array(lengths_B, batch, length), reverse)
        made = (y.numpy(), kept.numpy(), last.numpy())
        run_shared(_forward, (*given, save, heads, array(first), *made), jobs)
        ctx.reverse, ctx.heads, ctx.blocks, ctx.jobs = reverse, heads, blocks, jobs
        ctx.save_for_backward(lengths_B, *inputs, kept)
        return y, last.permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        lengths_B, *inputs, kept = ctx.saved_tensors
        decay, dt, x, B, C, initial_BHPN = inputs
        fresh = torch.empty if lengths_B is None else torch.zeros
        ddecay, ddt, dx = fresh(dt.shape), fresh(dt.shape), fresh(x.shape)
        dB, dC = fresh(ctx.blocks, *B.shape), fresh(ctx.blocks, *B.shape)
        dfirst = torch.empty(x.shape[0], B.shape[3], *x.shape[2:])
        given = (*map(array, (decay, dt, x, B, C)), lengths_array(lengths_B, *x.shape[:2]), ctx.reverse, ctx.heads)
        made = (tensor.numpy() for tensor in (ddecay, ddt, dx, dB, dC, dfirst))
        dlast = array(grads[1].permute(0, 3, 1, 2))
        run_shared(_backward, (*given, kept.numpy(), array(grads[0]), dlast, *made), ctx.jobs)
        dinitial = None if initial_BHPN is None else dfirst.permute(0, 2, 3, 1)
        gradients = (ddecay, ddt, dx, dB.sum(0), dC.sum(0), dinitial)
        back = (None if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, inputs, strict=True))
        return None, None, *back
