"""The short convolution on CPUs where channels are contiguous: numba kernels on plain threads."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genossm.ops.kernels import bodies_numba, causal_conv1d_torch
from genossm.ops.kernels.threads_numba import array, copied, lengths_array, run_shared, threads_for
from genossm.ops.rows import dropped_states


def causal_conv1d(
    x_BLE: Tensor,
    w_EW: Tensor,
    bias_E: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state_BEW1: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve; see `genossm.ops.causal_conv1d.causal_conv1d`."""
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    seen_BL = None if drop_BL is None else _first_seen(drop_BL, lengths_B, w_EW.shape[1], reverse)
    y_BLE = _Conv.apply(activation == "silu", reverse, lengths_B, seen_BL, x_BLE, w_EW, bias_E, initial_state_BEW1)
    if not return_state:
        return y_BLE
    width = w_EW.shape[1]
    around_BSE = causal_conv1d_torch.with_state(x_BLE, width, initial_state_BEW1, reverse, lengths_B)
    epoch_BS = None if drop_BL is None else causal_conv1d_torch.document_numbers(drop_BL, width, reverse)
    return y_BLE, causal_conv1d_torch.last_inputs(around_BSE, width, reverse, lengths_B, epoch_BS)


def _first_seen(drop_BL: Tensor, lengths_B: Tensor | None, width: int, reverse: bool) -> Tensor:
    """Return, at each position, the first step of its document in the scan's order; 1 - W where no drop came yet."""
    batch, length = drop_BL.shape
    step_BL = torch.arange(length).expand(batch, -1)
    if reverse:
        ends_B = torch.full((batch,), length) if lengths_B is None else lengths_B.to(step_BL)
        step_BL = ends_B[:, None] - 1 - step_BL
        marked_BL = torch.where(drop_BL, step_BL, 1 - width)
        return marked_BL.flip(1).cummax(1).values.flip(1).contiguous()
    return torch.where(drop_BL, step_BL, 1 - width).cummax(1).values.contiguous()


def _arguments(lengths_B: Tensor | None, seen_BL: Tensor | None, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x_BLE, w_EW, bias_E, initial_BEW1 = inputs
    batch, length, width = x_BLE.shape
    return (
        array(x_BLE),
        copied(w_EW.t()),
        np.zeros(width, np.float32) if bias_E is None else copied(bias_E),
        lengths_array(lengths_B, batch, length),
        np.zeros((1, 1), np.int64) if seen_BL is None else seen_BL.numpy(),
        np.zeros((batch, w_EW.shape[1] - 1, width), np.float32)
        if initial_BEW1 is None
        else array(initial_BEW1.transpose(1, 2)),
        seen_BL is not None,
    )


class _Conv(torch.autograd.Function):
    """The kernels with their own backward; only the inputs are kept."""

    @staticmethod
    def forward(
        ctx: Any, silu: bool, reverse: bool, lengths_B: Tensor | None, seen_BL: Tensor | None, *inputs: Any
    ) -> Tensor:
        x_BLE = inputs[0]
        y_BLE = (torch.empty if lengths_B is None else torch.zeros)(x_BLE.shape)
        jobs = threads_for(x_BLE.shape[0] * -(-x_BLE.shape[1] // bodies_numba.CHUNK))
        arguments = (*_arguments(lengths_B, seen_BL, inputs), silu, reverse, y_BLE.numpy())
        run_shared(bodies_numba.conv_forward, arguments, jobs)
        ctx.silu, ctx.reverse = silu, reverse
        ctx.save_for_backward(lengths_B, seen_BL, *inputs)
        return y_BLE.to(x_BLE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        lengths_B, seen_BL, *inputs = ctx.saved_tensors
        x_BLE, w_EW, bias_E, initial_BEW1 = inputs
        batch, _, width = x_BLE.shape
        jobs = threads_for(batch * -(-width // bodies_numba.BLOCK))
        taps = w_EW.shape[1]
        dx, dfirst = torch.zeros(x_BLE.shape), torch.zeros(batch, taps - 1, width)
        dw, dbias = torch.zeros(jobs, taps, width), torch.zeros(jobs, width)
        arguments = (*_arguments(lengths_B, seen_BL, tuple(inputs)), ctx.silu, ctx.reverse, array(grads[0]))
        made = (tensor.numpy() for tensor in (dx, dw, dbias, dfirst))
        run_shared(bodies_numba.conv_backward, (*arguments, *made), jobs)
        return (
            None,
            None,
            None,
            None,
            dx.to(x_BLE.dtype),
            dw.sum(0).t().to(w_EW.dtype),
            None if bias_E is None else dbias.sum(0).to(bias_E.dtype),
            None if initial_BEW1 is None else dfirst.transpose(1, 2).to(initial_BEW1.dtype),
        )
