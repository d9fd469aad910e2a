"""Position-wise networks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.ops.gelu import gelu


class MLP(nn.Module):
    """Two linear layers with a tanh-approximate GELU between them: D -> F -> D."""

    def __init__(self, d_model: int, d_inner: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_inner, bias=bias)
        self.fc2 = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.fc1(x_BLD)
        if h_BLF.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            weight, bias = self.fc2.weight.to(h_BLF.dtype), self.fc2.bias
            return GeluLinear.apply(h_BLF, weight, None if bias is None else bias.to(h_BLF.dtype))
        return self.fc2(gelu(h_BLF))


class GeluLinear(torch.autograd.Function):
    """h, weight, bias -> the linear layer of gelu(h), which is made again: it is the widest tensor of a model."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        h_BLF, weight_DF, bias_D = given
        ctx.save_for_backward(h_BLF, weight_DF)
        ctx.has_bias = bias_D is not None
        return F.linear(F.gelu(h_BLF, approximate="tanh"), weight_DF, bias_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_BLF, weight_DF = ctx.saved_tensors
        dy_MD = grads[0].flatten(0, -2)
        made_MF = F.gelu(h_BLF, approximate="tanh").flatten(0, -2)
        dw_DF = dy_MD.T @ made_MF
        del made_MF
        d_BLF = torch.ops.aten.gelu_backward(grads[0] @ weight_DF, h_BLF, approximate="tanh")
        return d_BLF, dw_DF, dy_MD.sum(0) if ctx.has_bias else None
