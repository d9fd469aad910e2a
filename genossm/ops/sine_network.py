"""The network of sines that makes implicit filters, from positional features to its last hidden layer, time last.

Its layers are as long as the input: op by op a GPU would write each of them, and several times again for the gradients.
"""

import importlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from genossm.ops import backend
from genossm.ops.rows import check_shapes

_MOST_WIDTH = 128
"""The widest network whose matrices a program of the kernel holds."""


def sine_network_ref(
    z_EL: Float[Tensor, "E L"],
    freq_F: Float[Tensor, " F"],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Float[Tensor, "F L"]:
    """Compute by the definition, the truth that `sine_network` is held to (Poli et al. 2023, appendix A).

    h = z;  h = sin(freq (w h + b)) with each layer's w and b in turn.
    """
    h_FL = z_EL
    for weight, bias_F in zip(weights, biases, strict=True):
        h_FL = torch.sin(freq_F[:, None] * (weight @ h_FL + bias_F[:, None]))
    return h_FL


def sine_network(
    z_EL: Float[Tensor, "E L"],
    freq_F: Float[Tensor, " F"],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Float[Tensor, "F L"]:
    """Apply layers of sines of one frequency a feature.

    Args:
        z_EL: features of each position.
        freq_F: frequencies, which all layers share.
        weights: w_FE of the first layer, w_FF of those behind it.
        biases: b_F of each layer.

    Returns:
        The last layer h_FL, in the dtype of z.

    Raises:
        ValueError: shapes don't fit.
    """
    width, features = freq_F.shape[0], z_EL.shape[0]
    shapes = [(width, features), *[(width, width)] * (len(weights) - 1)]
    check_shapes(
        **{f"weights[{i}]": (weight, shapes[i]) for i, weight in enumerate(weights)},
        **{f"biases[{i}]": (bias_F, (width,)) for i, bias_F in enumerate(biases)},
    )
    fits = width <= _MOST_WIDTH and {t.dtype for t in (z_EL, freq_F, *weights, *biases)} == {torch.float32}
    if fits and backend.beside_triton("sine_network", z_EL) == "triton":
        kernels = importlib.import_module("genossm.ops.kernels.sine_network_triton")
        return kernels.SineNetwork.apply(z_EL, freq_F, len(weights), *weights, *biases)
    if fits and backend.beside_triton("sine_network", z_EL) == "reference":
        return sine_network_ref(z_EL, freq_F, weights, biases)
    h_FL = z_EL
    for weight, bias_F in zip(weights, biases, strict=True):
        h_FL = torch.sin(freq_F[:, None] * torch.addmm(bias_F[:, None], weight, h_FL))
    return h_FL
