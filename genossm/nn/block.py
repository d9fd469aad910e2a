"""The pre-norm residual block that every backbone stacks."""

from typing import Any

import torch
from torch import Tensor, nn

from genossm.nn.norm import added
from genossm.ops import kept

_PIECE = {"cpu": 1 << 10, "cuda": 1 << 16}
"""Positions that an MLP takes at once where no gradient is needed, by kind of device."""


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)) where there is an MLP.

    What a call has beside x goes to the mixer as it is: the mask of real positions, or a scan's lengths and documents.

    A mixer that runs token by token has `init_state(batch_size)` and `extend(x_BLD, state) -> (y_BLD, state)`.
    """

    def __init__(
        self,
        norm1: nn.Module,
        mixer: nn.Module,
        norm2: nn.Module | None = None,
        mlp: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, *context: Tensor | None) -> Tensor:
        x_BLD, normed_BLD = added(self.norm1, x_BLD, None)
        return self._add(x_BLD, self.mixer(normed_BLD, *context))

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the mixer's state before the first position."""
        return self.mixer.init_state(batch_size)  # type: ignore[operator]

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Run positions that follow those that made `state`; returns them and the state after them."""
        y_BLD, state = self.mixer.extend(self.norm1(x_BLD), state)  # type: ignore[operator]
        return self._add(x_BLD, y_BLD), state

    def _add(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        y_BLD = self.dropout1(y_BLD)
        if self.mlp is None or self.norm2 is None:
            return x_BLD + y_BLD
        piece = _PIECE.get(x_BLD.device.type)
        if not torch.is_grad_enabled() and piece is not None and not torch.compiler.is_compiling():
            x_BLD = x_BLD + y_BLD
            # Pieces stay in cache, and the wide hidden layer of a long input never exists at once; x is ours here.
            for piece_BLD in x_BLD.split(piece, dim=1):
                piece_BLD += self.dropout2(self.mlp(added(self.norm2, piece_BLD, None)[1]))
            return x_BLD
        x_BLD, normed_BLD = added(self.norm2, x_BLD, y_BLD)
        # Dropout keeps which values it drops, and neither it nor the sum any value.
        with kept.last_step():
            y_BLD = self.mlp(normed_BLD)
        return x_BLD + self.dropout2(y_BLD)
