"""Initialisation shared by the backbones."""

import math

from torch import nn


def init_linear_(module: nn.Module, n_layer: int, std: float = 0.02, residuals_per_layer: int = 2) -> None:
    """Draw the weights of all linear and embedding layers of a module from N(0, std^2); biases become 0.

    Layers named `out_proj` or `fc2` write into the residual stream and are scaled by 1 / sqrt(their number), so that
    its variance does not grow with depth (GPT-2; Radford et al. 2019, section 2.3).
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            writes_residual = name.rpartition(".")[2] in ("out_proj", "fc2")
            scale = 1 / math.sqrt(residuals_per_layer * n_layer) if writes_residual else 1.0
            nn.init.normal_(child.weight, std=std * scale)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
