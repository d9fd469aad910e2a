"""The tanh-approximate GELU, whose exponential is a fifth of a small model's training step on a CPU."""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.backend import beside_triton, choose
from genossm.ops.kernels.threads_numba import array, run_shared, threads_for

_LEAST = 1 << 14
"""Elements from which the kernel pays."""
_SHARE = 1 << 20
"""Elements a thread has at least: torch's own threads are still awake after the product before, and in the way."""


def gelu_ref(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Compute by the definition, the truth that `gelu` is held to (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), elementwise, in the dtype of x."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if fits and x.numel() >= _LEAST and choose("gelu", x.device, ("numba", "torch")).name == "numba":
        return _Gelu.apply(x)
    return F.gelu(x, approximate="tanh")


def gelu_backward_ref(
    h_MF: Float[Tensor, "M F"], d_MF: Float[Tensor, "M F"]
) -> tuple[Float[Tensor, "M F"], Float[Tensor, "M F"], Float[Tensor, " F"]]:
    """Differentiate the definition, the truth that `gelu_backward` is held to."""
    with torch.enable_grad():
        h_MF = h_MF.detach().requires_grad_()
        y_MF = gelu_ref(h_MF)
        (dh_MF,) = torch.autograd.grad(y_MF, h_MF, d_MF)
    return y_MF.detach(), dh_MF, dh_MF.sum(0)


def gelu_backward(
    h_MF: Float[Tensor, "M F"], d_MF: Float[Tensor, "M F"]
) -> tuple[Float[Tensor, "M F"], Float[Tensor, "M F"], Float[Tensor, " F"]]:
    """Return all that the gradients of an MLP take of its hidden layer.

    Args:
        h_MF: the first linear layer's result.
        d_MF: the gradient of the GELU's result.

    Returns:
        GELU(h) and the gradient of h, which may stand where h and d stood; and the sum of the latter over M, the
        gradient of the layer's bias.
    """
    chosen = beside_triton("gelu", h_MF)
    if chosen == "triton":
        return importlib.import_module("genossm.ops.kernels.gelu_triton").backward(h_MF, d_MF)
    if chosen == "reference":
        return gelu_backward_ref(h_MF, d_MF)
    dh_MF = torch.ops.aten.gelu_backward(d_MF, h_MF, approximate="tanh")
    return F.gelu(h_MF, approximate="tanh"), dh_MF, dh_MF.sum(0)


class _Gelu(torch.autograd.Function):
    """One pass forward and one backward; keeps the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from genossm.ops.kernels import gelu_numba

        x = x.contiguous()
        y = torch.empty_like(x)
        run_shared(gelu_numba.forward, (array(x.flatten()), array(y.flatten())), threads_for(x.numel() // _SHARE))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        from genossm.ops.kernels import gelu_numba

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        passed = (array(x.flatten()), array(grads[0].flatten()), array(dx.flatten()))
        run_shared(gelu_numba.backward, passed, threads_for(x.numel() // _SHARE))
        return dx
