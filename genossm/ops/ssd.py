"""The state-space dual of Mamba-2 (Dao & Gu 2024, section 6): a selective scan whose decay is one scalar a head."""

import importlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import backend
from genossm.ops.rows import check_rows, check_shapes, dropped_states, real_positions

_KERNELS = {
    "triton": "genossm.ops.kernels.ssd_triton",
    "numba": "genossm.ops.kernels.ssd_numba",
    "torch": "genossm.ops.kernels.ssd_torch",
    "mamba_ssm": "genossm.ops.kernels.scans_mamba_ssm",
}
"""The module whose `ssd` is a backend, fastest first; the last runs where it is asked for alone."""


def ssd_ref(
    x_BLHP: Float[Tensor, "B L H P"],
    dt_BLH: Float[Tensor, "B L H"],
    A_H: Float[Tensor, " H"],
    B_BLGN: Float[Tensor, "B L G N"],
    C_BLGN: Float[Tensor, "B L G N"],
    D: Float[Tensor, " H"] | Float[Tensor, "H P"] | None = None,
    z_BLHP: Float[Tensor, "B L H P"] | None = None,
    dt_bias_H: Float[Tensor, " H"] | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BHPN: Float[Tensor, "B H P N"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H P"] | tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """Scan position by position, the truth that `ssd` is held to.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T;  y[t] = (h[t] C[t] + D x[t]) silu(z[t]), with
    dt = softplus(dt + bias) and the heads of one group sharing B and C (Mamba-2, section 7).
    """
    batch, length, heads, _ = x_BLHP.shape
    check_rows(lengths_B, resets_BL, batch, length)
    dtype = torch.float64 if x_BLHP.dtype == torch.float64 else torch.float32
    x, dt = x_BLHP.to(dtype), dt_BLH.to(dtype)
    B, C = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B_BLGN, C_BLGN))
    if dt_bias_H is not None:
        dt = dt + dt_bias_H.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    real_BL = real_positions(lengths_B, length)
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    h = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if initial_state_BHPN is None else initial_state_BHPN.to(dtype)
    y: list[Tensor] = [x.new_zeros(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(dt[:, t] * A_H.to(dtype))
        if drop_BL is not None:
            decay = torch.where(drop_BL[:, t, None], 0.0, decay)
        after = decay[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        h = after if real_BL is None else torch.where(real_BL[:, t, None, None, None], after, h)
        y[t] = (h * C[:, t, :, None]).sum(-1)
    y_BLHP = torch.stack(y, dim=1)
    if D is not None:
        y_BLHP = y_BLHP + (D if D.ndim == 2 else D[:, None]).to(dtype) * x
    if z_BLHP is not None:
        y_BLHP = y_BLHP * F.silu(z_BLHP.to(dtype))
    if real_BL is not None:
        y_BLHP = torch.where(real_BL[..., None, None], y_BLHP, 0.0)
    y_BLHP = y_BLHP.to(x_BLHP.dtype)
    return (y_BLHP, h) if return_state else y_BLHP


def ssd(
    x_BLHP: Float[Tensor, "B L H P"],
    dt_BLH: Float[Tensor, "B L H"],
    A_H: Float[Tensor, " H"],
    B_BLGN: Float[Tensor, "B L G N"],
    C_BLGN: Float[Tensor, "B L G N"],
    D: Float[Tensor, " H"] | Float[Tensor, "H P"] | None = None,
    z_BLHP: Float[Tensor, "B L H P"] | None = None,
    dt_bias_H: Float[Tensor, " H"] | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BHPN: Float[Tensor, "B H P N"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Any:
    """Run the state-space dual on the fastest backend that the tensors' device has.

    Args:
        x_BLHP: input, H heads of width P.
        dt_BLH: step sizes before their bias and softplus.
        A_H: decay rate of each head, not positive.
        B_BLGN, C_BLGN: how the input enters each state and how it is read, one a group of heads; G divides H.
        D: weight of the input itself, one a head or one a channel.
        z_BLHP: gate; the result is multiplied by silu(z).
        dt_bias_H: added to the step sizes.
        dt_softplus: make steps positive by a softplus.
        initial_state_BHPN: state before the first position (the last one where `reverse`).
        return_state: also return the state after the last position (the first one where `reverse`).
        reverse: run from right to left over the real part of each row; nothing is flipped in memory.
        lengths_B: number of real positions of each row, on the left; the rest gives 0 and leaves the state alone.
        resets_BL: true where a document starts: no state crosses its border, in either direction.

    Returns:
        y_BLHP in the dtype of x, or (y_BLHP, state_BHPN) with a state of float32 (float64 for float64 input).

    Raises:
        ValueError: no position, G does not divide H, tensors whose shapes don't fit the input's, lengths beyond it, or
            a backend asked for that can't run here.
    """
    batch, length, heads, headdim = x_BLHP.shape
    check_rows(lengths_B, resets_BL, batch, length)
    groups, states = B_BLGN.shape[-2:]
    check_shapes(
        dt_BLH=(dt_BLH, (batch, length, heads)),
        A_H=(A_H, (heads,)),
        B_BLGN=(B_BLGN, (batch, length, groups, states)),
        C_BLGN=(C_BLGN, (batch, length, groups, states)),
        D=(D, (heads,) if D is not None and D.ndim == 1 else (heads, headdim)),
        z_BLHP=(z_BLHP, (batch, length, heads, headdim)),
        dt_bias_H=(dt_bias_H, (heads,)),
        initial_state_BHPN=(initial_state_BHPN, (batch, heads, headdim, states)),
    )
    if x_BLHP.shape[2] % B_BLGN.shape[2]:
        raise ValueError(f"The {B_BLGN.shape[2]} groups of B and C must divide the {x_BLHP.shape[2]} heads.")
    # The kernels compute in float32.
    offered = [name for name in _KERNELS if name == "torch" or x_BLHP.dtype != torch.float64]
    chosen = backend.choose("ssd", x_BLHP.device, [*offered, "reference"]).name
    run = ssd_ref if chosen == "reference" else importlib.import_module(_KERNELS[chosen]).ssd
    return run(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        D,
        z_BLHP,
        dt_bias_H,
        dt_softplus=dt_softplus,
        initial_state_BHPN=initial_state_BHPN,
        return_state=return_state,
        reverse=reverse,
        lengths_B=lengths_B,
        resets_BL=resets_BL,
    )


def ssd_step(
    x_BHP: Float[Tensor, "B H P"],
    dt_BH: Float[Tensor, "B H"],
    A_H: Float[Tensor, " H"],
    B_BGN: Float[Tensor, "B G N"],
    C_BGN: Float[Tensor, "B G N"],
    D: Float[Tensor, " H"] | Float[Tensor, "H P"] | None = None,
    z_BHP: Float[Tensor, "B H P"] | None = None,
    dt_bias_H: Float[Tensor, " H"] | None = None,
    *,
    state_BHPN: Float[Tensor, "B H P N"],
    dt_softplus: bool = True,
) -> tuple[Float[Tensor, "B H P"], Float[Tensor, "B H P N"]]:
    """Scan one position; returns y_BHP and the state after it. The arguments are those of `ssd`."""
    dtype, heads = state_BHPN.dtype, x_BHP.shape[1]
    x, dt = x_BHP.to(dtype), dt_BH.to(dtype)
    B_BHN, C_BHN = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B_BGN, C_BGN))
    if dt_bias_H is not None:
        dt = dt + dt_bias_H.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    decay_BH = torch.exp(dt * A_H.to(dtype))
    state_BHPN = decay_BH[..., None, None] * state_BHPN + (dt[..., None] * x)[..., None] * B_BHN[:, :, None]
    y_BHP = torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BHN)
    if D is not None:
        y_BHP = y_BHP + (D if D.ndim == 2 else D[:, None]).to(dtype) * x
    if z_BHP is not None:
        y_BHP = y_BHP * F.silu(z_BHP.to(dtype))
    return y_BHP.to(x_BHP.dtype), state_BHPN
