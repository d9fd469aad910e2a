"""The short convolution in plain torch, for every device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.rows import dropped_states, real_positions


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
    """Convolve through `F.conv1d`; see `genossm.ops.causal_conv1d.causal_conv1d`."""
    length, width = x_BLE.shape[1], w_EW.shape[1]
    real_BL = real_positions(lengths_B, length)
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    taps_EW = w_EW.flip(-1) if reverse else w_EW
    if initial_state_BEW1 is None and real_BL is None and drop_BL is None and not return_state:
        y_BEL = F.conv1d(x_BLE.transpose(1, 2), taps_EW[:, None], bias_E, padding=width - 1, groups=w_EW.shape[0])
        y_BEL = y_BEL[..., width - 1 :] if reverse else y_BEL[..., :length]
        y_BLE = y_BEL.transpose(1, 2)
        return F.silu(y_BLE) if activation == "silu" else y_BLE
    around_BSE = with_state(x_BLE, width, initial_state_BEW1, reverse, lengths_B)
    epoch_BS = None if drop_BL is None else document_numbers(drop_BL, width, reverse)
    if epoch_BS is None:
        y_BLE = F.conv1d(around_BSE.transpose(1, 2), taps_EW[:, None], bias_E, groups=w_EW.shape[0]).transpose(1, 2)
    else:
        y_BLE = _within_documents(around_BSE, taps_EW, bias_E, epoch_BS, reverse)
    if activation == "silu":
        y_BLE = F.silu(y_BLE)
    if real_BL is not None:
        y_BLE = torch.where(real_BL[..., None], y_BLE, 0.0)
    if not return_state:
        return y_BLE
    return y_BLE, last_inputs(around_BSE, width, reverse, lengths_B, epoch_BS)


def with_state(
    x_BLE: Tensor, width: int, initial_BEW1: Tensor | None, reverse: bool, lengths_B: Tensor | None
) -> Tensor:
    """Return the row with the W - 1 inputs before it (behind its real part where `reverse`), in row order."""
    batch, length, channels = x_BLE.shape
    real_BL = real_positions(lengths_B, length)
    if real_BL is not None:
        x_BLE = torch.where(real_BL[..., None], x_BLE, 0.0)
    before_BWE = x_BLE.new_zeros(batch, width - 1, channels)
    if initial_BEW1 is not None:
        before_BWE = initial_BEW1.transpose(1, 2).to(x_BLE.dtype)
    if not reverse:
        return torch.cat([before_BWE, x_BLE], dim=1)
    before_BWE = before_BWE.flip(1)
    if lengths_B is None or initial_BEW1 is None:
        return torch.cat([x_BLE, before_BWE], dim=1)
    # Each row's state stands right behind its own last real position.
    slot_BW = lengths_B[:, None] + torch.arange(width - 1, device=lengths_B.device)
    padded_BSE = F.pad(x_BLE, (0, 0, 0, width - 1))
    return padded_BSE.scatter(1, slot_BW[..., None].expand(-1, -1, channels), before_BWE)


def document_numbers(drop_BL: Tensor, width: int, reverse: bool) -> Tensor:
    """Return, for the row with its state, how many documents the scan has left behind: equal means visible."""
    count_BL = drop_BL.int().cumsum(1)
    if reverse:
        count_BL = count_BL[:, -1:] - count_BL + drop_BL.int()
        return F.pad(count_BL, (0, width - 1))
    return F.pad(count_BL, (width - 1, 0))


def _within_documents(
    around_BSE: Tensor, taps_EW: Tensor, bias_E: Tensor | None, epoch_BS: Tensor, reverse: bool
) -> Tensor:
    width = taps_EW.shape[1]
    length = around_BSE.shape[1] - width + 1
    present = 0 if reverse else width - 1
    here_BL = epoch_BS[:, present : present + length]
    y_BLE = around_BSE.new_zeros(around_BSE.shape[0], length, around_BSE.shape[2])
    for j in range(width):
        seen_BL = epoch_BS[:, j : j + length] == here_BL
        y_BLE = y_BLE + taps_EW[:, j] * torch.where(seen_BL[..., None], around_BSE[:, j : j + length], 0.0)
    return y_BLE if bias_E is None else y_BLE + bias_E


def last_inputs(
    around_BSE: Tensor, width: int, reverse: bool, lengths_B: Tensor | None, epoch_BS: Tensor | None
) -> Tensor:
    """Return the last W - 1 inputs that the convolution met and the next position would see, newest last."""
    batch, total, channels = around_BSE.shape
    step_W = torch.arange(width - 1, device=around_BSE.device)
    if reverse:
        slot_BW = (width - 2 - step_W).expand(batch, -1)
    else:
        end_B = lengths_B if lengths_B is not None else torch.full((batch,), total - width + 1)
        slot_BW = end_B.to(around_BSE.device)[:, None] + step_W
    last_BWE = around_BSE.gather(1, slot_BW[..., None].expand(-1, -1, channels))
    if epoch_BS is not None and width > 1:
        epoch_BW = epoch_BS.gather(1, slot_BW)
        last_BWE = torch.where((epoch_BW == epoch_BW[:, -1:])[..., None], last_BWE, 0.0)
    return last_BWE.transpose(1, 2)
