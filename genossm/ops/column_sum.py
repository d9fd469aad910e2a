"""Sums over all positions, which the gradient of every bias is."""

import importlib

import torch
from jaxtyping import Float
from torch import Tensor

from genossm.ops import backend


def column_sum_ref(x_MD: Float[Tensor, "M D"]) -> Float[Tensor, " D"]:
    """Add up by the definition, the truth that `column_sum` is held to."""
    return x_MD.sum(0)


def column_sum(x_MD: Float[Tensor, "M D"], dtype: torch.dtype | None = None) -> Float[Tensor, " D"]:
    """Return the sums over M, added up in float32, in `dtype`: if None, that of x.

    Torch's own takes four times as long as reading x where M is a hundred thousand and D some hundreds (measured).
    """
    if x_MD.stride(1) == 1 and backend.beside_triton("column_sum", x_MD) == "triton":
        kernels = importlib.import_module("genossm.ops.kernels.column_sum_triton")
        return kernels.column_sum(x_MD).to(dtype or x_MD.dtype)
    return column_sum_ref(x_MD).to(dtype or x_MD.dtype)
