"""HyenaDNA as the published code computes it, for comparison only: same weights, same numbers, other arithmetic."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.models.hyenadna import HyenaDNA


def long_convolution(u_BDL: Tensor, k_DL: Tensor, skip_D: Tensor) -> Tensor:
    """Convolve with transforms of twice the length, whatever its factors, all channels at once."""
    length = u_BDL.shape[-1]
    size = 2 * length
    spectrum = torch.fft.rfft(u_BDL, n=size) * (torch.fft.rfft(k_DL, n=size) / size)
    return torch.fft.irfft(spectrum, n=size, norm="forward")[..., :length] + u_BDL * skip_D[:, None]


class PublishedHyenaDNA(nn.Module):
    """A causal order-2 `HyenaDNA` run in the published order of operations and layouts; shares its parameters."""

    def __init__(self, model: HyenaDNA):
        super().__init__()
        self.model: Any = model
        self.blocks: list[Any] = list(model.layers)
        taps = [block.mixer.filter_fn.positions(model.max_length) for block in self.blocks]
        self.features = [(z_EL.T.contiguous()[None], t_L[None, :, None]) for z_EL, t_L in taps]

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return the logits."""
        model = self.model
        hidden, residual = model.dropout(F.embedding(ids_BL.long(), model.embedding.weight)), None
        for block, features in zip(self.blocks, self.features, strict=True):
            residual = hidden if residual is None else hidden + residual
            hidden = self._mix(block.mixer, block.norm1(residual), *features)
            residual = hidden + residual
            mlp = block.mlp
            hidden = mlp.fc2(F.gelu(mlp.fc1(block.norm2(residual)), approximate="tanh"))
        assert residual is not None
        return F.linear(model.norm_f(hidden + residual), model.embedding.weight)

    def _mix(self, mixer: Any, x_BLD: Tensor, z_1LE: Tensor, t_1L1: Tensor) -> Tensor:
        length = x_BLD.shape[1]
        u_BCL = mixer.in_proj(x_BLD).transpose(1, 2)
        u_BCL = F.conv1d(u_BCL, mixer.short_filter.weight, mixer.short_filter.bias, padding=2, groups=u_BCL.shape[1])
        x0_BDL, x1_BDL, v_BDL = u_BCL[..., :length].split(x_BLD.shape[-1], dim=1)
        filters = mixer.filter_fn
        h_1LE = z_1LE[:, :length]
        for layer in filters.implicit_filter:
            h_1LE = layer(h_1LE) if isinstance(layer, nn.Linear) else torch.sin(layer.freq * h_1LE)
        k_1LD = h_1LE * (torch.exp(-t_1L1[:, :length] * filters.deltas_C.abs()) + filters.shift)
        y_BDL = long_convolution(v_BDL * x1_BDL, k_1LD[0].T.contiguous(), filters.bias) * x0_BDL
        return mixer.out_proj(y_BDL.transpose(1, 2))
