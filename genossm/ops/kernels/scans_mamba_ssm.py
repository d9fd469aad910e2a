"""Both scans by the kernels of the mamba-ssm package, where it is installed and `use_backend("mamba_ssm")` asks for it.

They know neither padded rows nor, for Mamba-1, documents and a state to start from; such calls are refused, and a scan
from right to left turns its tensors in memory. Ours have none of these limits: this backend is for comparisons.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256
"""Positions of a chunk of Mamba-2, as in the published layer."""


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
    """Scan by `selective_scan_fn`; see `genossm.ops.selective_scan.selective_scan`.

    Raises:
        ValueError: padded rows, documents or a state to start from.
    """
    _refuse("selective_scan", {"lengths": lengths_B, "resets": resets_BL, "an initial state": initial_state_BEN})
    run = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, dt, B, C, z = (_channels_first(tensor, reverse) for tensor in (u_BLE, dt_BLE, B_BLN, C_BLN, z_BLE))
    bias, skip = (None if tensor is None else tensor.float() for tensor in (dt_bias_E, D_E))
    y, state_BEN = run(u, dt, A_EN.float(), B, C, skip, z, bias, dt_softplus, True)
    y_BLE = (y.flip(2) if reverse else y).transpose(1, 2)
    return (y_BLE, state_BEN) if return_state else y_BLE


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
    """Scan by `mamba_chunk_scan_combined`; see `genossm.ops.ssd.ssd`.

    Raises:
        ValueError: padded rows or documents.
    """
    _refuse("ssd", {"lengths": lengths_B, "resets": resets_BL})
    run = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    long = (x_BLHP, dt_BLH, B_BLGN, C_BLGN, z_BLHP)
    x, dt, B, C, z = (t if t is None or not reverse else t.flip(1) for t in long)
    y_BLHP, state_BHPN = run(
        *(x, dt, A_H, B, C, _CHUNK),
        D=D,
        z=z,
        dt_bias=dt_bias_H,
        initial_states=initial_state_BHPN,
        dt_softplus=dt_softplus,
        return_final_states=True,
    )
    y_BLHP = y_BLHP.flip(1) if reverse else y_BLHP
    return (y_BLHP, state_BHPN) if return_state else y_BLHP


def _channels_first(x_BLE: Tensor | None, reverse: bool) -> Any:
    if x_BLE is None:
        return None
    turned = x_BLE.flip(1) if reverse else x_BLE
    return turned.transpose(1, 2).contiguous()


def _refuse(op: str, given: Mapping[str, torch.Tensor | None]) -> None:
    unknown = [name for name, tensor in given.items() if tensor is not None]
    if unknown:
        raise ValueError(f"mamba_ssm's {op} takes no {' and no '.join(unknown)}; leave use_backend('mamba_ssm') out.")
