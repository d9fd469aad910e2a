"""The selective scan on CPUs: numba kernels on plain threads. Half-precision input is computed in float32."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genossm.ops.kernels import bodies_numba
from genossm.ops.kernels.threads_numba import array, copied, lengths_array, run_shared, threads_for
from genossm.ops.rows import dropped_states


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
    """Scan decays (softplus steps, A <= 0); see `genossm.ops.selective_scan.selective_scan`."""
    assert dt_softplus
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    y_BLE, state_BEN = _Scan.apply(
        reverse, lengths_B, drop_BL, u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, initial_state_BEN
    )
    return (y_BLE, state_BEN) if return_state else y_BLE


def _arguments(reverse: bool, lengths_B: Tensor | None, drop_BL: Tensor | None, inputs: list[Any]) -> tuple[Any, ...]:
    """Return the kernels' common arguments; what isn't given is zeros or an array that no kernel reads."""
    u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, bias_E, _ = inputs
    batch, length, width = u_BLE.shape
    return (
        array(u_BLE),
        array(dt_BLE),
        np.zeros((1, 1, 1), np.float32) if z_BLE is None else array(z_BLE),
        array(B_BLN),
        array(C_BLN),
        copied(A_EN.t()),
        np.zeros(width, np.float32) if D_E is None else copied(D_E),
        np.zeros(width, np.float32) if bias_E is None else copied(bias_E),
        lengths_array(lengths_B, batch, length),
        np.zeros((1, 1), np.bool_) if drop_BL is None else drop_BL.contiguous().numpy(),
        z_BLE is not None,
        drop_BL is not None,
        reverse,
    )


class _Scan(torch.autograd.Function):
    """The kernels with their own backward; kept are the inputs and one state every CHUNK positions."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, lengths_B: Tensor | None, drop_BL: Tensor | None, *inputs: Any) -> Any:
        u_BLE, A_EN, initial_BEN = inputs[0], inputs[2], inputs[8]
        batch, length, width = u_BLE.shape
        save = any(ctx.needs_input_grad)
        # Padding is never written, so it has to be 0 from the start.
        y_BLE = (torch.empty if lengths_B is None else torch.zeros)(u_BLE.shape)
        chunks = -(-length // bodies_numba.CHUNK) if save else 0
        kept_BKNE = torch.empty(batch, chunks, A_EN.shape[1], width)
        last_BNE = torch.empty(batch, A_EN.shape[1], width)
        first_BNE = torch.zeros_like(last_BNE) if initial_BEN is None else initial_BEN.transpose(1, 2)
        jobs = threads_for(batch * -(-width // bodies_numba.BLOCK))
        run_shared(
            bodies_numba.scan_forward,
            (
                *_arguments(reverse, lengths_B, drop_BL, list(inputs)),
                save,
                array(first_BNE),
                y_BLE.numpy(),
                kept_BKNE.numpy(),
                last_BNE.numpy(),
            ),
            jobs,
        )
        ctx.reverse, ctx.jobs = reverse, jobs
        ctx.save_for_backward(lengths_B, drop_BL, *inputs, kept_BKNE)
        return y_BLE.to(u_BLE.dtype), last_BNE.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        lengths_B, drop_BL, *inputs, kept_BKNE = ctx.saved_tensors
        u_BLE, _, A_EN, B_BLN, _, D_E, z_BLE, bias_E, initial_BEN = inputs
        batch, _, width = u_BLE.shape
        fresh = torch.empty if lengths_B is None else torch.zeros
        du, ddt, dz = fresh(u_BLE.shape), fresh(u_BLE.shape), fresh((1, 1, 1) if z_BLE is None else u_BLE.shape)
        blocks = -(-width // bodies_numba.BLOCK)
        dB, dC = fresh(blocks, *B_BLN.shape), fresh(blocks, *B_BLN.shape)
        dA = torch.zeros(ctx.jobs, A_EN.shape[1], width)
        dD, dbias = torch.zeros(ctx.jobs, width), torch.zeros(ctx.jobs, width)
        dfirst = torch.empty(batch, A_EN.shape[1], width)
        made = (du, ddt, dz, dB, dC, dA, dD, dbias, dfirst)
        run_shared(
            bodies_numba.scan_backward,
            (
                *_arguments(ctx.reverse, lengths_B, drop_BL, inputs),
                kept_BKNE.numpy(),
                array(grads[0]),
                array(grads[1].transpose(1, 2)),
                *(tensor.numpy() for tensor in made),
            ),
            ctx.jobs,
        )
        gradients = (
            du,
            ddt,
            dA.sum(0).t(),
            dB.sum(0),
            dC.sum(0),
            None if D_E is None else dD.sum(0),
            None if z_BLE is None else dz,
            None if bias_E is None else dbias.sum(0),
            None if initial_BEN is None else dfirst.transpose(1, 2),
        )
        back = (None if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, inputs, strict=True))
        return None, None, None, *back
