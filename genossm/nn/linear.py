"""Linear layers between tensors whose width, and tensors whose time, is contiguous in memory, with no copy."""

import torch
from torch import Tensor


def to_time(weight_CD: Tensor, x_BLD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Apply a linear layer; the result (B, L, C) has time contiguous in memory, whatever the form of x.

    A product with the weight on the left writes that form at the speed of any product; a copy between the forms of a
    long row takes some thirty times as long on a GPU.
    """
    x_BDL = x_BLD.transpose(1, 2)
    weight_BCD = weight_CD.expand(x_BLD.shape[0], -1, -1)
    if bias_C is None:
        return torch.bmm(weight_BCD, x_BDL).transpose(1, 2)
    return torch.baddbmm(bias_C[:, None], weight_BCD, x_BDL).transpose(1, 2)


def from_time(weight_CD: Tensor, x_BLD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Apply a linear layer to x, whose time may be contiguous in memory; the result has its width contiguous."""
    weight_BDC = weight_CD.T.expand(x_BLD.shape[0], -1, -1)
    if bias_C is None:
        return torch.bmm(x_BLD, weight_BDC)
    return torch.baddbmm(bias_C, x_BLD, weight_BDC)
