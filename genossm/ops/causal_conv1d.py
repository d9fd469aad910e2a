"""Short depthwise convolutions over time: Hyena's (width 3) and Mamba's (width 4)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_ref(
    x_BLD: Float[Tensor, "B L D"], w_DW: Float[Tensor, "D W"], bias_D: Float[Tensor, " D"] | None = None
) -> Float[Tensor, "B L D"]:
    """Convolve by the definition, the truth that `causal_conv1d` is held to: y[t] = bias + sum_j w[W-1-j] x[t-j]."""
    width = w_DW.shape[1]
    y_BLD = torch.zeros_like(x_BLD) if bias_D is None else bias_D.expand_as(x_BLD).clone()
    for t in range(x_BLD.shape[1]):
        for j in range(min(width, t + 1)):
            y_BLD[:, t] = y_BLD[:, t] + w_DW[:, width - 1 - j] * x_BLD[:, t - j]
    return y_BLD


def causal_conv1d(
    x_BLD: Float[Tensor, "B L D"], w_DW: Float[Tensor, "D W"], bias_D: Float[Tensor, " D"] | None = None
) -> Float[Tensor, "B L D"]:
    """Convolve each channel with its own W taps, the last of which meets the present position.

    Args:
        x_BLD: input; time contiguous in memory (`x_BDL.transpose(1, 2)`) is the fast case and the result's form.
        w_DW: taps.
        bias_D: added to the result.

    Returns:
        y_BLD.
    """
    width = w_DW.shape[1]
    y_BDL = F.conv1d(x_BLD.transpose(1, 2), w_DW[:, None], bias_D, padding=width - 1, groups=w_DW.shape[0])
    return y_BDL[..., : x_BLD.shape[1]].transpose(1, 2)
