"""Short depthwise convolutions over time: Hyena's (width 3) and Mamba's (width 4)."""

import importlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import backend
from genossm.ops.rows import check_rows, check_shapes, dropped_states, real_positions

_KERNELS = {
    "triton": "genossm.ops.kernels.causal_conv1d_triton",
    "numba": "genossm.ops.kernels.causal_conv1d_numba",
    "torch": "genossm.ops.kernels.causal_conv1d_torch",
}
"""The module whose `causal_conv1d` is a backend, fastest first."""


def causal_conv1d_ref(
    x_BLE: Float[Tensor, "B L E"],
    w_EW: Float[Tensor, "E W"],
    bias_E: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = None,
    initial_state_BEW1: Float[Tensor, "B E W1"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L E"] | tuple[Float[Tensor, "B L E"], Float[Tensor, "B E W1"]]:
    """Convolve position by position, the truth that `causal_conv1d` is held to.

    y[t] = act(bias + sum_j w[W-1-j] x[t-j]): a window of the last W inputs slides along the row and is emptied where
    a document starts.
    """
    batch, length, width = x_BLE.shape
    check_rows(lengths_B, resets_BL, batch, length)
    real_BL = real_positions(lengths_B, length)
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    state = x_BLE.new_zeros(batch, width, w_EW.shape[1] - 1) if initial_state_BEW1 is None else initial_state_BEW1
    y: list[Tensor] = [x_BLE.new_zeros(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        if drop_BL is not None:
            state = torch.where(drop_BL[:, t, None, None], 0.0, state)
        window_BEW = torch.cat([state, x_BLE[:, t, :, None]], dim=-1)
        y[t] = (window_BEW * w_EW).sum(-1)
        state = (
            window_BEW[..., 1:]
            if real_BL is None
            else torch.where(real_BL[:, t, None, None], window_BEW[..., 1:], state)
        )
    y_BLE = torch.stack(y, dim=1)
    if bias_E is not None:
        y_BLE = y_BLE + bias_E
    if activation is not None:
        y_BLE = F.silu(y_BLE)
    if real_BL is not None:
        y_BLE = torch.where(real_BL[..., None], y_BLE, 0.0)
    return (y_BLE, state) if return_state else y_BLE


def causal_conv1d(
    x_BLE: Float[Tensor, "B L E"],
    w_EW: Float[Tensor, "E W"],
    bias_E: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = None,
    initial_state_BEW1: Float[Tensor, "B E W1"] | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Integer[Tensor, " B"] | None = None,
    resets_BL: Bool[Tensor, "B L"] | None = None,
) -> Any:
    """Convolve each channel with its own W taps, the last of which meets the present position.

    Args:
        x_BLE: input; time contiguous in memory (`x_BEL.transpose(1, 2)`) and width contiguous are both fast, and the
            result has the same form.
        w_EW: taps.
        bias_E: added to the result.
        activation: None or "silu".
        initial_state_BEW1: the W - 1 inputs before the row (after it, nearest last, where `reverse`); None is zeros.
        return_state: also return the last W - 1 inputs that the convolution met, newest last.
        reverse: run from right to left over the real part of each row: tap j meets position t + j.
        lengths_B: number of real positions of each row, on the left; the rest gives 0 and is not seen.
        resets_BL: true where a document starts: the window doesn't reach over its border, in either direction.

    Returns:
        y_BLE, or (y_BLE, state_BEW1).

    Raises:
        ValueError: another activation, no position, tensors whose shapes don't fit the input's, or lengths beyond it.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu'; got {activation!r}.")
    batch, length, width = x_BLE.shape
    check_rows(lengths_B, resets_BL, batch, length)
    taps = w_EW.shape[-1]
    check_shapes(
        w_EW=(w_EW, (width, taps)),
        bias_E=(bias_E, (width,)),
        initial_state_BEW1=(initial_state_BEW1, (batch, width, taps - 1)),
    )
    # The CPU kernel computes in float32 with channels contiguous; torch's own is the fast one where time is.
    fits = x_BLE.device.type != "cpu" or (x_BLE.dtype != torch.float64 and x_BLE.stride(2) == 1)
    offered = [name for name in _KERNELS if name != "numba" or fits]
    chosen = backend.choose("causal_conv1d", x_BLE.device, [*offered, "reference"]).name
    conv = causal_conv1d_ref if chosen == "reference" else importlib.import_module(_KERNELS[chosen]).causal_conv1d
    return conv(
        x_BLE,
        w_EW,
        bias_E,
        activation=activation,
        initial_state_BEW1=initial_state_BEW1,
        return_state=return_state,
        reverse=reverse,
        lengths_B=lengths_B,
        resets_BL=resets_BL,
    )


def causal_conv1d_step(
    x_BE: Float[Tensor, "B E"],
    w_EW: Float[Tensor, "E W"],
    bias_E: Float[Tensor, " E"] | None = None,
    *,
    state_BEW1: Float[Tensor, "B E W1"],
    activation: str | None = None,
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E W1"]]:
    """Convolve one position; returns y_BE and the state after it. The arguments are those of `causal_conv1d`."""
    window_BEW = torch.cat([state_BEW1, x_BE[..., None]], dim=-1)
    y_BE = (window_BEW * w_EW).sum(-1)
    if bias_E is not None:
        y_BE = y_BE + bias_E
    return F.silu(y_BE) if activation == "silu" else y_BE, window_BEW[..., 1:]
