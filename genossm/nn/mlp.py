"""Position-wise networks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.ops import kept
from genossm.ops.column_sum import column_sum
from genossm.ops.gelu import gelu, gelu_backward


class MLP(nn.Module):
    """Two linear layers with a tanh-approximate GELU between them: D -> F -> D."""

    def __init__(self, d_model: int, d_inner: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_inner, bias=bias)
        self.fc2 = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        if x_BLD.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_BLD.dtype
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return NarrowMLP.apply(x_BLD.to(dtype), *weights)
        return self.fc2(gelu(self.fc1(x_BLD)))


class NarrowMLP(torch.autograd.Function):
    """x, weight 1, bias 1, weight 2, bias 2 -> the MLP in the dtype of x; the weights' gradients have theirs.

    It keeps x alone: the hidden layer is made again, both ways.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x_BLD, *weights = given
        ctx.dtype, ctx.has_bias = weights[0].dtype, weights[-1] is not None
        rounded: list[Any] = [None if weight is None else weight.to(x_BLD.dtype) for weight in weights]
        in_FD, bias_F, out_DF, bias_D = rounded
        ctx.save_for_backward(x_BLD, in_FD, bias_F, out_DF)
        if kept.unread():
            # One number for all, which whoever took it would notice.
            return x_BLD.new_full((), float("nan")).expand(*x_BLD.shape[:-1], len(out_DF))
        return F.linear(_hidden(x_BLD, in_FD, bias_F), out_DF, bias_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, in_FD, bias_F, out_DF = ctx.saved_tensors
        x_MD, dy_MD = x_BLD.flatten(0, -2), grads[0].flatten(0, -2)
        hidden_MF, d_MF, d_bias_F = gelu_backward(F.linear(x_MD, in_FD, bias_F), dy_MD @ out_DF)
        d_out_DF = (dy_MD.T @ hidden_MF).to(ctx.dtype)
        del hidden_MF
        d_bias_D = column_sum(dy_MD, ctx.dtype) if ctx.has_bias else None
        d_bias = None if bias_F is None else d_bias_F.to(ctx.dtype)
        return (d_MF @ in_FD).view_as(x_BLD), (d_MF.T @ x_MD).to(ctx.dtype), d_bias, d_out_DF, d_bias_D


def _hidden(x_BLD: Tensor, in_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Return the hidden layer; on a GPU bias and GELU come with the product."""
    if x_BLD.is_cuda and bias_F is not None:
        return torch._addmm_activation(bias_F, x_BLD.flatten(0, -2), in_FD.T, use_gelu=True).unflatten(
            0, x_BLD.shape[:-1]
        )
    return F.gelu(F.linear(x_BLD, in_FD, bias_F), approximate="tanh")
