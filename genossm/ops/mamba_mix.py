"""What stands between the projections of a Mamba layer: short convolution, selection, scan, gate, one way or both."""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import backend
from genossm.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from genossm.ops.selective_scan import selective_scan, selective_scan_ref


class Direction(NamedTuple):
    """One direction's weights, in the order of a Mamba layer (Gu & Dao 2023, section 3.4)."""

    conv_EW: Tensor
    conv_bias_E: Tensor | None
    x_proj_CE: Tensor
    """Makes the selection, C = R + 2 N: the steps' bottleneck, B and C."""
    dt_proj_ER: Tensor
    dt_bias_E: Tensor | None
    A_EN: Tensor
    D_E: Tensor | None
    reverse: bool = False
    """Whether it reads from right to left."""


def mamba_mix_ref(
    xz_BLE2: Float[Tensor, "B L E2"],
    directions: Sequence[Direction],
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L E"]:
    """Mix by the references of its parts, the truth that `mamba_mix` is held to."""
    return _by_parts(causal_conv1d_ref, selective_scan_ref, xz_BLE2, directions, lengths_B, resets_BL)


def mamba_mix(
    x_BLX: Float[Tensor, "B L X"],
    directions: Sequence[Direction],
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
    in_proj: tuple[Tensor, Tensor | None] | None = None,
) -> Float[Tensor, "B L E"]:
    """Mix along time and add up the directions.

    Args:
        x_BLX: input and gate side by side, X = 2 E; or with `in_proj` what they are made of, X = D.
        directions: the weights of each, all of the same shapes.
        lengths_B, resets_BL: see `selective_scan`.
        in_proj: weight and bias of the projection that makes input and gate; on a GPU these are made again in the
            backward pass, for they are wider than all else that a layer would keep.

    Returns:
        y_BLE.
    """
    fused = resets_BL is None and x_BLX.dtype != torch.float64 and x_BLX.stride(2) == 1
    if (
        fused
        and backend.choose("mamba_mix", x_BLX.device, ["triton", "numba", "mamba_ssm", "torch", "reference"]).name
        == "triton"
    ):
        kernels = importlib.import_module("genossm.ops.kernels.mamba_mix_triton")
        weights = [weight for direction in directions for weight in direction[:-1]]
        given = (None, None) if in_proj is None else in_proj
        return kernels.MambaMix.apply(x_BLX, *given, lengths_B, [d.reverse for d in directions], *weights)
    xz_BLE2 = x_BLX if in_proj is None else F.linear(x_BLX, *in_proj)
    return _by_parts(causal_conv1d, selective_scan, xz_BLE2, directions, lengths_B, resets_BL)


def select(x: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """Return the raw steps, B and C that a convolved input selects."""
    rank, states = direction.dt_proj_ER.shape[1], direction.A_EN.shape[1]
    dt, B, C = F.linear(x, direction.x_proj_CE).split([rank, states, states], dim=-1)
    return F.linear(dt, direction.dt_proj_ER), B, C


def _by_parts(conv: Any, scan: Any, xz_BLE2: Tensor, directions: Sequence[Direction], *rows: Tensor | None) -> Tensor:
    x_BLE, z_BLE = xz_BLE2.chunk(2, dim=-1)
    total: Tensor | None = None
    for d in directions:
        options: dict[str, Any] = {"reverse": d.reverse, "lengths_B": rows[0], "resets_BL": rows[1]}
        u_BLE = conv(x_BLE, d.conv_EW, d.conv_bias_E, activation="silu", **options)
        dt_BLE, B_BLN, C_BLN = select(u_BLE, d)
        skip_E = None if d.D_E is None else d.D_E.to(u_BLE.dtype)
        y_BLE = scan(u_BLE, dt_BLE, d.A_EN, B_BLN, C_BLN, skip_E, z_BLE, d.dt_bias_E, **options)
        total = y_BLE if total is None else total + y_BLE
    assert total is not None
    return total
