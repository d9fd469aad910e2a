"""A residual network of dilated convolutions, causal or centred: the baseline that sees only so far."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.models.prenorm import PreNorm, PreNormConfig


@dataclass(frozen=True, kw_only=True)
class CNNConfig(PreNormConfig):
    """The shape of a CNN; the default has the size of the smallest HyenaDNA and sees 505 positions."""

    model_type: ClassVar[str] = "cnn"

    d_model: int = 64
    n_layer: int = 6
    kernel_size: int = 9
    """Taps of each convolution, odd."""
    dilation_cycle: int = 6
    """Layers over which the dilation doubles from 1 on, before it starts again."""
    causal: bool = True
    """A position sees what is before it, for the next token; false sees as far on both sides, for masked tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {self.kernel_size}.")
        if self.dilation_cycle < 1:
            raise ValueError(f"dilation_cycle must be at least 1; got {self.dilation_cycle}.")

    @property
    def dilations(self) -> tuple[int, ...]:
        """Steps between the taps of each layer."""
        return tuple(2 ** (layer % self.dilation_cycle) for layer in range(self.n_layer))

    @property
    def receptive_field(self) -> int:
        """Positions that a position sees, itself included."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)

    def build(self) -> "CNN":
        return CNN(self)


class DilatedConv(nn.Module):
    """A dense convolution over time as a mixer; what lies outside the sequence, and padding, counts as zero.

    Args:
        d_model: width D.
        kernel_size: taps W.
        dilation: steps between taps.
        causal: whether the last tap stands at the position itself; else the middle one does.
    """

    def __init__(self, d_model: int, kernel_size: int, dilation: int, causal: bool):
        super().__init__()
        self.dilation, self.span = dilation, (kernel_size - 1) * dilation
        self.ahead = 0 if causal else self.span // 2
        self.conv = nn.Conv1d(d_model, d_model, kernel_size, dilation=dilation)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Mix along time; `mask_BL` marks real positions and is needed only where padding could be seen: both ways."""
        if mask_BL is not None:
            x_BLD = x_BLD * mask_BL[..., None]
        return self._convolve(F.pad(x_BLD, (0, 0, self.span - self.ahead, self.ahead)))

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the inputs that the next positions still see: zeros."""
        weight = self.conv.weight
        return {"x_BSD": weight.new_zeros(batch_size, self.span, weight.shape[1])}

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix positions that follow those in the state; returns their values and the state after them."""
        seen_BLD = torch.cat([state["x_BSD"].to(x_BLD.dtype), x_BLD], dim=1)
        return self._convolve(seen_BLD), {"x_BSD": seen_BLD[:, x_BLD.shape[1] :]}

    def _convolve(self, x_BLD: Tensor) -> Tensor:
        return F.gelu(self.conv(x_BLD.transpose(1, 2)), approximate="tanh").transpose(1, 2)


class CNN(PreNorm):
    """The CNN backbone."""

    config: CNNConfig

    def __init__(self, config: CNNConfig):
        width, taps = config.d_model, config.kernel_size
        super().__init__(config, (DilatedConv(width, taps, step, config.causal) for step in config.dilations))

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def streams(self) -> bool:
        return self.causal
