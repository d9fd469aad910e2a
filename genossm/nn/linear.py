"""A linear layer whose bias gets its gradient in one pass over memory on a GPU."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.ops.column_sum import column_sum


def linear(layer: nn.Linear, x_BLD: Tensor) -> Tensor:
    """Apply a linear layer; its weights are read, and the layer itself is called only where nothing is gained."""
    if not x_BLD.is_cuda or layer.bias is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(x_BLD)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_BLD.dtype
    return cast(Tensor, Linear.apply(x_BLD.to(dtype), layer.weight, layer.bias))


class Linear(torch.autograd.Function):
    """x, weight, bias -> x weight^T + bias in the dtype of x; the weights' gradients have theirs.

    Torch's own sum for the bias takes four times as long as reading.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x_BLD, weight_CD, bias_C = given
        ctx.dtype = weight_CD.dtype
        weight_CD = weight_CD.to(x_BLD.dtype)
        ctx.save_for_backward(x_BLD, weight_CD)
        return F.linear(x_BLD, weight_CD, bias_C.to(x_BLD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BLD, weight_CD = ctx.saved_tensors
        dy_MC = grads[0].flatten(0, -2)
        dw_CD = (dy_MC.T @ x_BLD.flatten(0, -2)).to(ctx.dtype)
        return (dy_MC @ weight_CD).view_as(x_BLD), dw_CD, column_sum(dy_MC, ctx.dtype)
