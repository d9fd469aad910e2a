"""The selective scan of Mamba (Gu & Dao 2023, algorithm 2): a diagonal recurrence whose step depends on the input.

Logical layout is (batch, length, width). Every backend takes what `selective_scan` takes and accumulates in float32
(float64 for float64 input).
"""

import importlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import backend
from genossm.ops.rows import check_rows, check_shapes, dropped_states, real_positions

_KERNELS = {
    "triton": "genossm.ops.kernels.selective_scan_triton",
    "numba": "genossm.ops.kernels.selective_scan_numba",
    "torch": "genossm.ops.kernels.selective_scan_torch",
    "mamba_ssm": "genossm.ops.kernels.scans_mamba_ssm",
}
"""The module whose `selective_scan` is a backend, fastest first; the last runs where it is asked for alone."""


def selective_scan_ref(
    u_BLE: Float[Tensor, "B L E"],
    dt_BLE: Float[Tensor, "B L E"],
    A_EN: Float[Tensor, "E N"],
    B_BLN: Float[Tensor, "B L N"],
    C_BLN: Float[Tensor, "B L N"],
    D_E: Float[Tensor, " E"] | None = None,
    z_BLE: Float[Tensor, "B L E"] | None = None,
    dt_bias_E: Float[Tensor, " E"] | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BEN: Float[Tensor, "B E N"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L E"] | tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """Scan position by position, the truth that `selective_scan` is held to.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t];  y[t] = (C[t] h[t] + D u[t]) silu(z[t]), with dt = softplus(dt + bias)
    (Mamba, equations 2a, 2b and 4, with the input discretised by Euler's rule as in the published code).
    """
    batch, length, width = u_BLE.shape
    check_rows(lengths_B, resets_BL, batch, length)
    dtype = torch.float64 if u_BLE.dtype == torch.float64 else torch.float32
    u, dt, B, C = (tensor.to(dtype) for tensor in (u_BLE, dt_BLE, B_BLN, C_BLN))
    if dt_bias_E is not None:
        dt = dt + dt_bias_E.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    real_BL = real_positions(lengths_B, length)
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    h = u.new_zeros(batch, width, A_EN.shape[1]) if initial_state_BEN is None else initial_state_BEN.to(dtype)
    y: list[Tensor] = [u.new_zeros(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(dt[:, t, :, None] * A_EN.to(dtype))
        if drop_BL is not None:
            decay = torch.where(drop_BL[:, t, None, None], 0.0, decay)
        after = decay * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        h = after if real_BL is None else torch.where(real_BL[:, t, None, None], after, h)
        y[t] = (h * C[:, t, None]).sum(-1)
    y_BLE = torch.stack(y, dim=1)
    if D_E is not None:
        y_BLE = y_BLE + D_E.to(dtype) * u
    if z_BLE is not None:
        y_BLE = y_BLE * F.silu(z_BLE.to(dtype))
    if real_BL is not None:
        y_BLE = torch.where(real_BL[..., None], y_BLE, 0.0)
    y_BLE = y_BLE.to(u_BLE.dtype)
    return (y_BLE, h) if return_state else y_BLE


def selective_scan(
    u_BLE: Float[Tensor, "B L E"],
    dt_BLE: Float[Tensor, "B L E"],
    A_EN: Float[Tensor, "E N"],
    B_BLN: Float[Tensor, "B L N"],
    C_BLN: Float[Tensor, "B L N"],
    D_E: Float[Tensor, " E"] | None = None,
    z_BLE: Float[Tensor, "B L E"] | None = None,
    dt_bias_E: Float[Tensor, " E"] | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BEN: Float[Tensor, "B E N"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Any:
    """Run the selective scan on the fastest backend that the tensors' device has.

    Args:
        u_BLE: input.
        dt_BLE: step sizes before their bias and softplus.
        A_EN: decay rates; negative ones in every trained Mamba.
        B_BLN, C_BLN: how the input enters each state and how it is read.
        D_E: weight of the input itself.
        z_BLE: gate; the result is multiplied by silu(z).
        dt_bias_E: added to the step sizes.
        dt_softplus: make steps positive by a softplus.
        initial_state_BEN: state before the first position (the last one where `reverse`).
        return_state: also return the state after the last position (the first one where `reverse`).
        reverse: run from right to left over the real part of each row; nothing is flipped in memory.
        lengths_B: number of real positions of each row, on the left; the rest gives 0 and leaves the state alone.
        resets_BL: true where a document starts: no state crosses its border, in either direction.

    Returns:
        y_BLE in the dtype of u, or (y_BLE, state_BEN) with a state of float32 (float64 for float64 input).

    Raises:
        ValueError: no position, tensors whose shapes don't fit the input's, lengths beyond it, or a backend asked for
            that can't run here.
    """
    batch, length, width = u_BLE.shape
    check_rows(lengths_B, resets_BL, batch, length)
    states = A_EN.shape[-1]
    check_shapes(
        dt_BLE=(dt_BLE, (batch, length, width)),
        A_EN=(A_EN, (width, states)),
        B_BLN=(B_BLN, (batch, length, states)),
        C_BLN=(C_BLN, (batch, length, states)),
        D_E=(D_E, (width,)),
        z_BLE=(z_BLE, (batch, length, width)),
        dt_bias_E=(dt_bias_E, (width,)),
        initial_state_BEN=(initial_state_BEN, (batch, width, states)),
    )
    offered = [name for name in _KERNELS if name != "numba" or _numba_takes(u_BLE, A_EN, dt_softplus)]
    chosen = backend.choose("selective_scan", u_BLE.device, [*offered, "reference"]).name
    scan = selective_scan_ref if chosen == "reference" else importlib.import_module(_KERNELS[chosen]).selective_scan
    return scan(
        u_BLE,
        dt_BLE,
        A_EN,
        B_BLN,
        C_BLN,
        D_E,
        z_BLE,
        dt_bias_E,
        dt_softplus=dt_softplus,
        initial_state_BEN=initial_state_BEN,
        return_state=return_state,
        reverse=reverse,
        lengths_B=lengths_B,
        resets_BL=resets_BL,
    )


def _numba_takes(u_BLE: Tensor, A_EN: Tensor, dt_softplus: bool) -> bool:
    # The CPU kernel computes in float32, and its exponential is exact at 0 and below only.
    if u_BLE.device.type != "cpu":
        return True
    return u_BLE.dtype != torch.float64 and dt_softplus and bool((A_EN <= 0).all())


def selective_scan_step(
    u_BE: Float[Tensor, "B E"],
    dt_BE: Float[Tensor, "B E"],
    A_EN: Float[Tensor, "E N"],
    B_BN: Float[Tensor, "B N"],
    C_BN: Float[Tensor, "B N"],
    D_E: Float[Tensor, " E"] | None = None,
    z_BE: Float[Tensor, "B E"] | None = None,
    dt_bias_E: Float[Tensor, " E"] | None = None,
    *,
    state_BEN: Float[Tensor, "B E N"],
    dt_softplus: bool = True,
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E N"]]:
    """Scan one position; returns y_BE and the state after it. The arguments are those of `selective_scan`."""
    dtype = state_BEN.dtype
    u, dt = u_BE.to(dtype), dt_BE.to(dtype)
    if dt_bias_E is not None:
        dt = dt + dt_bias_E.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    decay_BEN = torch.exp(dt[..., None] * A_EN.to(dtype))
    state_BEN = decay_BEN * state_BEN + (dt * u)[..., None] * B_BN[:, None].to(dtype)
    y_BE = torch.einsum("ben,bn->be", state_BEN, C_BN.to(dtype))
    if D_E is not None:
        y_BE = y_BE + D_E.to(dtype) * u
    if z_BE is not None:
        y_BE = y_BE * F.silu(z_BE.to(dtype))
    return y_BE.to(u_BE.dtype), state_BEN
