"""The selective scan in plain torch, for every device: chunks that fit in cache, one fused step a position.

The states of one chunk at a time are in memory; the backward pass makes them again from the state at each chunk's
border. The recurrence is the exact one: no cumulative products, which overflow. States lie as (batch, state, channel),
so that loops over contiguous memory are long and sums over states are products of matrices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.rows import dropped_states, real_positions

_CHUNK_VALUES = 1 << 17
"""State values of one chunk: with as many decays they fill half of one core's second-level cache."""
_TRAINED_CHUNK_VALUES = 1 << 19
"""The same where a state a chunk is kept for the backward pass, of which fewer shall be."""
_SPAN = 256
"""Positions whose inputs are prepared at once: each operation costs as much as a few hundred values do."""


@dataclass(frozen=True)
class _Plan:
    """What the passes share besides tensors."""

    dtype: torch.dtype
    chunk: int
    softplus: bool
    reverse: bool

    def spans(self, length: int) -> list[slice]:
        """Return stretches of whole chunks in the order in which the scan meets them."""
        size = max(self.chunk, _SPAN // self.chunk * self.chunk)
        slices = [slice(start, min(length, start + size)) for start in range(0, length, size)]
        return slices[::-1] if self.reverse else slices

    def order(self, n: int) -> range:
        """Return the positions (or chunks) of n in the order in which the scan meets them."""
        return range(n - 1, -1, -1) if self.reverse else range(n)


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
    """Scan in chunks; see `genossm.ops.selective_scan.selective_scan`."""
    batch, length, width = u_BLE.shape
    dtype = torch.float64 if u_BLE.dtype == torch.float64 else torch.float32
    given = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, initial_state_BEN)
    trained = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    values = _TRAINED_CHUNK_VALUES if trained else _CHUNK_VALUES
    chunk = max(16, min(128, values // (batch * width * A_EN.shape[1])))
    plan = _Plan(dtype, chunk, dt_softplus, reverse)
    y_BLE, state_BNE = _Scan.apply(
        plan,
        real_positions(lengths_B, length),
        dropped_states(resets_BL, lengths_B, reverse),
        u_BLE,
        dt_BLE,
        A_EN.t().contiguous(),
        B_BLN,
        C_BLN,
        D_E,
        z_BLE,
        dt_bias_E,
        None if initial_state_BEN is None else initial_state_BEN.transpose(1, 2),
    )
    return (y_BLE, state_BNE.transpose(1, 2)) if return_state else y_BLE


def _time_major(x_BLE: Tensor, span: slice, dtype: torch.dtype) -> Tensor:
    return x_BLE[:, span].transpose(0, 1).to(dtype)


class _Buffer:
    """Memory for one chunk that every chunk uses anew, whole and position by position: views cost as much as steps."""

    def __init__(self, like: Tensor, positions: int):
        self.whole = like.new_empty(positions, *like.shape)
        self.rows = self.whole.unbind(0)


@dataclass
class _Inputs:
    """What goes along the sequence, for a stretch of it, time first."""

    u: Tensor
    raw: Tensor
    dt: Tensor
    entering: Tensor
    B: Tensor
    C: Tensor
    real: Tensor | None
    drop: Tensor | None

    @classmethod
    def of(cls, plan: _Plan, tensors: tuple[Any, ...], span: slice) -> "_Inputs":
        """Prepare a stretch: step sizes from their raw values, and what enters the states."""
        real_BL, drop_BL, u_BLE, dt_BLE, B_BLN, C_BLN, bias_E = tensors
        u, raw, B, C = (_time_major(x, span, plan.dtype) for x in (u_BLE, dt_BLE, B_BLN, C_BLN))
        if bias_E is not None:
            raw = raw + bias_E.to(plan.dtype)
        dt = F.softplus(raw) if plan.softplus else raw
        real = drop = None
        if real_BL is not None:
            # A step of size 0 leaves the state as it is.
            real = real_BL[:, span].t()[..., None]
            dt = torch.where(real, dt, 0.0)
            u = torch.where(real, u, 0.0)
        if drop_BL is not None:
            drop = drop_BL[:, span].t()[..., None, None]
        return cls(u, raw, dt, dt * u, B, C, real, drop)

    def chunks(self, plan: _Plan) -> list["_Inputs"]:
        """Return the chunks of the stretch, from left to right."""
        size, count = plan.chunk, -(-len(self.u) // plan.chunk)
        parts: Any = ((None,) * count if x is None else x.split(size) for x in vars(self).values())
        return [_Inputs(*part) for part in zip(*parts, strict=True)]


@dataclass
class _Steps:
    """What one chunk's positions do: decays and, once run, states, whole and position by position."""

    decay: Tensor
    h: Tensor
    decays: tuple[Tensor, ...]
    states: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: _Inputs, A_NE: Tensor, buffers: list[_Buffer]) -> "_Steps":
        """Discretise a chunk; `h` holds what each position adds to the state until `run`."""
        n = len(x.u)
        decay, h = buffers[0].whole[:n], buffers[1].whole[:n]
        torch.mul(x.dt[:, :, None], A_NE, out=decay).exp_()
        if x.drop is not None:
            decay.masked_fill_(x.drop, 0.0)
        torch.mul(x.entering[:, :, None], x.B[..., None], out=h)
        return cls(decay, h, buffers[0].rows[:n], buffers[1].rows[:n])

    def run(self, plan: _Plan, state_BNE: Tensor) -> Tensor:
        """Turn `h` into the states and return the last."""
        for i in plan.order(len(self.states)):
            state_BNE = self.states[i].addcmul_(self.decays[i], state_BNE)
        return state_BNE


class _Scan(torch.autograd.Function):
    """The chunked scan with its own backward; it keeps its inputs and one state a chunk."""

    @staticmethod
    @torch.no_grad()
    def forward(ctx: Any, plan: _Plan, real_BL: Tensor | None, drop_BL: Tensor | None, *inputs: Any) -> Any:
        u_BLE, dt_BLE, A_NE, B_BLN, C_BLN, D_E, z_BLE, bias_E, initial_BNE = inputs
        batch, length, _ = u_BLE.shape
        shape = (batch, *A_NE.shape)
        state = u_BLE.new_zeros(shape, dtype=plan.dtype)
        if initial_BNE is not None:
            state.copy_(initial_BNE)
        A_NE = A_NE.to(plan.dtype)
        kept = state.new_empty(-(-length // plan.chunk), *shape) if any(ctx.needs_input_grad) else None
        buffers = [_Buffer(state, min(plan.chunk, length)) for _ in range(2)]
        y_BLE = torch.empty(u_BLE.shape, dtype=u_BLE.dtype, device=u_BLE.device)
        for span in plan.spans(length):
            x = _Inputs.of(plan, (real_BL, drop_BL, u_BLE, dt_BLE, B_BLN, C_BLN, bias_E), span)
            chunks = x.chunks(plan)
            read: list[Tensor] = [x.u] * len(chunks)
            for index in plan.order(len(chunks)):
                if kept is not None:
                    kept[span.start // plan.chunk + index] = state
                steps = _Steps.of(chunks[index], A_NE, buffers)
                state = steps.run(plan, state).clone()
                read[index] = chunks[index].C[:, :, None] @ steps.h
            y = torch.cat(read).squeeze(-2)
            if D_E is not None:
                y.addcmul_(x.u, D_E.to(plan.dtype))
            if z_BLE is not None:
                y.mul_(F.silu(_time_major(z_BLE, span, plan.dtype)))
            if x.real is not None:
                y.masked_fill_(~x.real, 0.0)
            y_BLE[:, span] = y.transpose(0, 1)
        ctx.plan = plan
        ctx.save_for_backward(real_BL, drop_BL, *inputs, kept)
        return y_BLE, state

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: _Plan = ctx.plan
        real_BL, drop_BL, *inputs, kept = ctx.saved_tensors
        u_BLE, dt_BLE, A_NE, B_BLN, C_BLN, _, _, bias_E, _ = inputs
        A_NE = A_NE.to(plan.dtype)
        dy_BLE, carry = grads[0], grads[1].to(plan.dtype).contiguous()
        made = [None if tensor is None else torch.zeros_like(tensor, dtype=plan.dtype) for tensor in inputs]
        buffers = [_Buffer(carry, min(plan.chunk, u_BLE.shape[1])) for _ in range(3)]
        for span in reversed(plan.spans(u_BLE.shape[1])):
            x = _Inputs.of(plan, (real_BL, drop_BL, u_BLE, dt_BLE, B_BLN, C_BLN, bias_E), span)
            dout = _time_major(dy_BLE, span, plan.dtype)
            if x.real is not None:
                dout = torch.where(x.real, dout, 0.0)
            chunks, douts = x.chunks(plan), dout.split(plan.chunk)
            for index in reversed(plan.order(len(chunks))):
                start = span.start + index * plan.chunk
                before = kept[start // plan.chunk]
                steps = _Steps.of(chunks[index], A_NE, buffers[:2])
                steps.run(plan, before)
                place = slice(start, start + len(douts[index]))
                carry = _chunk_gradients(
                    plan, chunks[index], steps, before, douts[index], carry, place, inputs, made, buffers[2]
                )
        if made[8] is not None:
            made[8] = carry
        back = (None if m is None else m.to(tensor.dtype) for m, tensor in zip(made, inputs, strict=True))
        return None, None, None, *back


def _chunk_gradients(
    plan: _Plan,
    x: _Inputs,
    steps: _Steps,
    before: Tensor,
    dout: Tensor,
    carry: Tensor,
    span: slice,
    inputs: list[Any],
    made: list[Any],
    buffer: _Buffer,
) -> Tensor:
    """Add a chunk's gradients to `made`; `carry` is that of the state after the chunk, the result of that before."""
    _, _, A_NE, _, _, D_E, z_BLE, bias_E, _ = inputs
    n = len(dout)
    if z_BLE is not None:
        z = _time_major(z_BLE, span, plan.dtype)
        gate = torch.sigmoid(z)
        y = (x.C[:, :, None] @ steps.h).squeeze(-2)
        if D_E is not None:
            y.addcmul_(x.u, D_E.to(plan.dtype))
        made[6][:, span] = (dout * y * gate * (1 + z * (1 - gate))).transpose(0, 1)
        dout = dout * z * gate
    made[4][:, span] = (steps.h @ dout[..., None]).squeeze(-1).transpose(0, 1)
    g = torch.mul(dout[:, :, None], x.C[..., None], out=buffer.whole[:n])
    # g[t] becomes the gradient of state t: what its own output gives and what the next state hands back.
    gradients, decays = buffer.rows, steps.decays
    order = plan.order(n)
    gradients[order[-1]].add_(carry)
    for i in range(n - 2, -1, -1):
        gradients[order[i]].addcmul_(decays[order[i + 1]], gradients[order[i + 1]])
    carry = decays[order[0]] * gradients[order[0]]
    made[3][:, span] = (g @ x.entering[..., None]).squeeze(-1).transpose(0, 1)
    dinput = (x.B[:, :, None] @ g).squeeze(-2)
    # From here on g is the gradient of each decay's exponent: g * decay * the state before.
    g.mul_(steps.decay)
    gradients[order[0]].mul_(before)
    if n > 1:
        ahead, behind = (slice(1, n), slice(0, n - 1))
        if plan.reverse:
            ahead, behind = behind, ahead
        g[ahead].mul_(steps.h[behind])
    # The states are read for the last time; their memory takes what is summed.
    ddt = torch.mul(g, A_NE.to(plan.dtype), out=steps.h).sum(-2).addcmul_(dinput, x.u)
    made[2] += g.mul_(x.dt[:, :, None]).sum((0, 1))
    du = dinput * x.dt
    if D_E is not None:
        made[5] += (dout * x.u).sum((0, 1))
        du.addcmul_(dout, D_E.to(plan.dtype))
    if plan.softplus:
        ddt *= torch.sigmoid(x.raw)
    if x.real is not None:
        ddt.masked_fill_(~x.real, 0.0)
    if bias_E is not None:
        made[7] += ddt.sum((0, 1))
    made[0][:, span], made[1][:, span] = du.transpose(0, 1), ddt.transpose(0, 1)
    return carry
