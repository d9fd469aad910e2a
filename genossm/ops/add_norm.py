"""A residual addition and the norm of its sum, which read and write the widest tensors of a model."""

import importlib

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from genossm.ops import backend


def add_norm_ref(
    x_BLD: Float[Tensor, "*B D"],
    y_BLD: Float[Tensor, "*B D"] | None,
    weight_D: Float[Tensor, " D"],
    bias_D: Float[Tensor, " D"] | None,
    eps: float,
    rms: bool = False,
) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """Add and normalise by the definitions, the truth that `add_norm` is held to (Ba et al. 2016; Zhang 2019)."""
    total = x_BLD if y_BLD is None else x_BLD + y_BLD
    centred = total if rms else total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D
    return total, normed if bias_D is None else normed + bias_D


def add_norm(
    x_BLD: Float[Tensor, "*B D"],
    y_BLD: Float[Tensor, "*B D"] | None,
    weight_D: Float[Tensor, " D"],
    bias_D: Float[Tensor, " D"] | None,
    eps: float,
    rms: bool = False,
) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """Return x + y and its LayerNorm (its RMS norm where `rms`).

    Args:
        x_BLD: the residual stream.
        y_BLD: what is added to it; None adds nothing.
        weight_D, bias_D: of the norm.
        eps: of the norm.
        rms: neither subtract the mean nor add a bias.

    Returns:
        The sum in the dtype of x, and its norm: under autocast on a GPU in the dtype that the next product takes.
    """
    if backend.beside_triton("add_norm", x_BLD) == "triton":
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_BLD.dtype
        kernels = importlib.import_module("genossm.ops.kernels.add_norm_triton")
        return kernels.AddNorm.apply(x_BLD, y_BLD, weight_D, bias_D, eps, rms, dtype)
    return _plain(x_BLD, y_BLD, weight_D, bias_D, eps, rms)


def _plain(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    total = x if y is None else x + y
    width = [x.shape[-1]]
    return total, F.rms_norm(total, width, weight, eps) if rms else F.layer_norm(total, width, weight, bias, eps)
