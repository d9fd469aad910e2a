"""Linear layers between tensors whose width, and tensors whose time, is contiguous in memory, with no copy either way.

A product with the weight on the left writes either form at the speed of any product; a copy between the forms of a long
row takes some thirty times as long on a GPU. Autograd's own gradients would come in the other form.
"""

from typing import Any

import torch
from torch import Tensor

from genossm.ops.column_sum import column_sum


class ToTime(torch.autograd.Function):
    """x_BLD, weight_CD, bias_C or None -> (B, C, L); the gradient of x has its width contiguous."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x_BLD, weight_CD, bias_C = given
        ctx.save_for_backward(x_BLD, weight_CD)
        ctx.has_bias = bias_C is not None
        weight_BCD = weight_CD.expand(x_BLD.shape[0], -1, -1)
        x_BDL = x_BLD.transpose(1, 2)
        return weight_BCD @ x_BDL if bias_C is None else torch.baddbmm(bias_C[:, None], weight_BCD, x_BDL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_BLD, weight_CD = ctx.saved_tensors
        dy_BCL = grads[0]
        dx_BLD = product(dy_BCL.transpose(1, 2), weight_CD.to(dy_BCL.dtype))
        dw_CD = product_sum(dy_BCL, x_BLD.to(dy_BCL.dtype))
        d_bias_C = dy_BCL.sum((0, 2)).to(weight_CD.dtype) if ctx.has_bias else None
        return dx_BLD.to(x_BLD.dtype), dw_CD.to(weight_CD.dtype), d_bias_C


def from_time(x_BDL: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
    """Return the linear layer's (B, L, C)."""
    if len(x_BDL) == 1:
        # The bias comes with the product; that of several would be written first, and read again.
        return torch.addmm(bias_C, x_BDL[0].T, weight_CD.T)[None]
    return torch.baddbmm(bias_C, x_BDL.transpose(1, 2), weight_CD.T.expand(len(x_BDL), -1, -1))


class FromTime(torch.autograd.Function):
    """x_BDL, weight_CD, bias_C -> (B, L, C); the gradient of x has its time contiguous."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x_BDL, weight_CD, bias_C = given
        ctx.dtype = weight_CD.dtype
        if torch.is_autocast_enabled(x_BDL.device.type):
            # As the product takes it, so that the backward pass need not round it again.
            weight_CD = weight_CD.to(torch.get_autocast_dtype(x_BDL.device.type))
        ctx.save_for_backward(x_BDL, weight_CD)
        return from_time(x_BDL, weight_CD, bias_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BDL, weight_CD = ctx.saved_tensors
        dy_BLC = grads[0]
        dy_BCL = dy_BLC.transpose(1, 2)
        dx_BDL = product(weight_CD.T.to(dy_BLC.dtype), dy_BCL)
        dw_CD = product_sum(dy_BCL, x_BDL.to(dy_BLC.dtype).transpose(1, 2))
        return dx_BDL.to(x_BDL.dtype), dw_CD.to(ctx.dtype), column_sum(dy_BLC.flatten(0, 1), ctx.dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right of rows of matrices (B, M, K) and (B, K, N), one of which may be a matrix for all rows.

    As a matrix a single row goes through fewer steps of torch, each of which takes longer than computing a short row.
    """
    if len(left if left.ndim == 3 else right) == 1:
        return torch.mm(*(x[0] if x.ndim == 3 else x for x in (left, right)))[None]
    # One matrix on the left of many would be copied.
    return left.expand(len(right), -1, -1) @ right if left.ndim == 2 else left @ right


def product_sum(left_BMK: Tensor, right_BKN: Tensor) -> Tensor:
    """Return the sum over rows of left @ right."""
    made_BMN = product(left_BMK, right_BKN)
    return made_BMN[0] if len(made_BMN) == 1 else made_BMN.sum(0)
