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

_CHUNK_VALUES = 1 << 19
"""State values of one chunk: what one core's second-level cache holds of them and as many decays (measured)."""


@dataclass(frozen=True)
class _Plan:
    """What the passes share besides tensors."""

    dtype: torch.dtype
    chunk: int
    softplus: bool
    reverse: bool

    def borders(self, length: int) -> list[slice]:
        """Return the chunks in the order in which the scan meets them."""
        slices = [slice(start, min(length, start + self.chunk)) for start in range(0, length, self.chunk)]
        return slices[::-1] if self.reverse else slices

    def order(self, n: int) -> range:
        """Return the positions of a chunk of n in the order in which the scan meets them."""
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
    chunk = max(16, min(128, _CHUNK_VALUES // (batch * width * A_EN.shape[1])))
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
class _Steps:
    """What one chunk's positions do, time first: inputs, step sizes, decays and, once run, states."""

    u: Tensor
    raw: Tensor
    dt: Tensor
    decay: Tensor
    h: Tensor
    decays: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    real: Tensor | None

    @classmethod
    def of(cls, plan: _Plan, tensors: tuple[Any, ...], span: slice, buffers: list[_Buffer]) -> "_Steps":
        """Discretise a chunk; `h` holds what each position adds to the state until `run`."""
        real_BL, drop_BL, u_BLE, dt_BLE, A_NE, B_BLN, bias_E = tensors
        u, raw = _time_major(u_BLE, span, plan.dtype), _time_major(dt_BLE, span, plan.dtype)
        if bias_E is not None:
            raw = raw + bias_E.to(plan.dtype)
        dt = F.softplus(raw) if plan.softplus else raw
        real = None
        if real_BL is not None:
            # A step of size 0 leaves the state as it is.
            real = real_BL[:, span].t()[..., None]
            dt = torch.where(real, dt, 0.0)
            u = torch.where(real, u, 0.0)
        n = u.shape[0]
        decay, h = buffers[0].whole[:n], buffers[1].whole[:n]
        torch.mul(dt[:, :, None], A_NE.to(plan.dtype), out=decay).exp_()
        if drop_BL is not None:
            decay.masked_fill_(drop_BL[:, span].t()[..., None, None], 0.0)
        torch.mul((dt * u)[:, :, None], _time_major(B_BLN, span, plan.dtype)[..., None], out=h)
        return cls(u, raw, dt, decay, h, buffers[0].rows[:n], buffers[1].rows[:n], real)

    def run(self, plan: _Plan, state_BNE: Tensor) -> Tensor:
        """Turn `h` into the states and return the last."""
        for i in plan.order(len(self.states)):
            state_BNE = self.states[i].addcmul_(self.decays[i], state_BNE)
        return state_BNE

    def read(self, C: Tensor, D_E: Tensor | None) -> Tensor:
        """Return what the states and the inputs give before the gate."""
        y = (C[:, :, None] @ self.h).squeeze(-2)
        return y if D_E is None else y.addcmul_(self.u, D_E.to(y.dtype))


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
        borders = plan.borders(length)
        keep = any(ctx.needs_input_grad)
        kept = state.new_empty(len(borders), *shape) if keep else None
        buffers = [_Buffer(state, min(plan.chunk, length)) for _ in range(2)]
        y_BLE = torch.empty(u_BLE.shape, dtype=u_BLE.dtype, device=u_BLE.device)
        for index, span in enumerate(borders):
            if kept is not None:
                kept[index] = state
            steps = _Steps.of(plan, (real_BL, drop_BL, u_BLE, dt_BLE, A_NE, B_BLN, bias_E), span, buffers)
            state = steps.run(plan, state).clone()
            y = steps.read(_time_major(C_BLN, span, plan.dtype), D_E)
            if z_BLE is not None:
                y.mul_(F.silu(_time_major(z_BLE, span, plan.dtype)))
            if steps.real is not None:
                y.masked_fill_(~steps.real, 0.0)
            y_BLE[:, span] = y.transpose(0, 1)
        ctx.plan = plan
        ctx.save_for_backward(real_BL, drop_BL, *inputs, kept)
        return y_BLE, state

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: _Plan = ctx.plan
        real_BL, drop_BL, *inputs, kept = ctx.saved_tensors
        u_BLE, dt_BLE, A_NE, B_BLN, _, _, _, bias_E, _ = inputs
        dy_BLE, carry = grads[0], grads[1].to(plan.dtype).contiguous()
        made = [None if tensor is None else torch.zeros_like(tensor, dtype=plan.dtype) for tensor in inputs]
        buffers = [_Buffer(carry, min(plan.chunk, u_BLE.shape[1])) for _ in range(3)]
        borders = plan.borders(u_BLE.shape[1])
        for index in range(len(borders) - 1, -1, -1):
            span = borders[index]
            steps = _Steps.of(plan, (real_BL, drop_BL, u_BLE, dt_BLE, A_NE, B_BLN, bias_E), span, buffers[:2])
            steps.run(plan, kept[index])
            dout = _time_major(dy_BLE, span, plan.dtype)
            if steps.real is not None:
                dout = torch.where(steps.real, dout, 0.0)
            carry = _chunk_gradients(plan, steps, kept[index], dout, carry, span, inputs, made, buffers[2])
        if made[8] is not None:
            made[8] = carry
        back = (None if m is None else m.to(tensor.dtype) for m, tensor in zip(made, inputs, strict=True))
        return None, None, None, *back


def _chunk_gradients(
    plan: _Plan,
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
    _, _, A_NE, B_BLN, C_BLN, D_E, z_BLE, bias_E, _ = inputs
    n = len(dout)
    B, C = _time_major(B_BLN, span, plan.dtype), _time_major(C_BLN, span, plan.dtype)
    if z_BLE is not None:
        z = _time_major(z_BLE, span, plan.dtype)
        gate = torch.sigmoid(z)
        y = steps.read(C, D_E)
        made[6][:, span] = (dout * y * gate * (1 + z * (1 - gate))).transpose(0, 1)
        dout = dout * z * gate
    made[4][:, span] = (steps.h @ dout[..., None]).squeeze(-1).transpose(0, 1)
    g = torch.mul(dout[:, :, None], C[..., None], out=buffer.whole[:n])
    # g[t] becomes the gradient of state t: what its own output gives and what the next state hands back.
    gradients, decays = buffer.rows, steps.decays
    order = plan.order(n)
    gradients[order[-1]].add_(carry)
    for i in range(n - 2, -1, -1):
        gradients[order[i]].addcmul_(decays[order[i + 1]], gradients[order[i + 1]])
    carry = decays[order[0]] * gradients[order[0]]
    made[3][:, span] = (g @ (steps.dt * steps.u)[..., None]).squeeze(-1).transpose(0, 1)
    dinput = (B[:, :, None] @ g).squeeze(-2)
    # From here on g is the gradient of each decay's exponent: g * decay * the state before.
    g.mul_(steps.decay)
    gradients[order[0]].mul_(before)
    if n > 1:
        ahead, behind = (slice(1, n), slice(0, n - 1))
        if plan.reverse:
            ahead, behind = behind, ahead
        g[ahead].mul_(steps.h[behind])
    # The states are read for the last time; their memory takes what is summed.
    ddt = torch.mul(g, A_NE.to(plan.dtype), out=steps.h).sum(-2).addcmul_(dinput, steps.u)
    made[2] += g.mul_(steps.dt[:, :, None]).sum((0, 1))
    du = dinput * steps.dt
    if D_E is not None:
        made[5] += (dout * steps.u).sum((0, 1))
        du.addcmul_(dout, D_E.to(plan.dtype))
    if plan.softplus:
        ddt *= torch.sigmoid(steps.raw)
    if steps.real is not None:
        ddt.masked_fill_(~steps.real, 0.0)
    if bias_E is not None:
        made[7] += ddt.sum((0, 1))
    made[0][:, span], made[1][:, span] = du.transpose(0, 1), ddt.transpose(0, 1)
    return carry
