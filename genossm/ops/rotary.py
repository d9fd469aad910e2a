"""Turning the halves of each head against each other by position: what rotary positions do to queries and keys."""

import importlib

import torch
from jaxtyping import Float
from torch import Tensor

from genossm.ops import backend
from genossm.ops.rows import check_shapes


def rotate_ref(
    x_BLHP: Float[Tensor, "B L H P"], cos_LP: Float[Tensor, "L P2"], sin_LP: Float[Tensor, "L P2"]
) -> Float[Tensor, "B L H P"]:
    """Turn by the definition, the truth that `rotate` is held to (Su et al. 2021, equation 34)."""
    # Half precision is turned in float32, which the result is rounded from once.
    first, second = x_BLHP.to(cos_LP.dtype).chunk(2, dim=-1)
    cos, sin = cos_LP[:, None], sin_LP[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHP.dtype)


def rotate(
    x_BLHP: Float[Tensor, "B L H P"], cos_LP: Float[Tensor, "L P2"], sin_LP: Float[Tensor, "L P2"]
) -> Float[Tensor, "B L H P"]:
    """Turn feature p of a head's first half and feature p of its second by the angle of their position.

    Args:
        x_BLHP: queries or keys.
        cos_LP, sin_LP: of the angle of each of the P / 2 pairs of features at each position; they get no gradient.

    Returns:
        The turned heads, in the dtype of x.

    Raises:
        ValueError: shapes don't fit.
    """
    half = (x_BLHP.shape[1], x_BLHP.shape[3] // 2)
    check_shapes(cos_LP=(cos_LP, half), sin_LP=(sin_LP, half))
    if backend.beside_triton("rotary", x_BLHP) == "triton":
        return importlib.import_module("genossm.ops.kernels.rotary_triton").Rotate.apply(x_BLHP, cos_LP, sin_LP)
    return rotate_ref(x_BLHP, cos_LP, sin_LP)
