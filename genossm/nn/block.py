"""The pre-norm residual block that every backbone stacks."""

from torch import Tensor, nn


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(
        self, norm1: nn.Module, mixer: nn.Module, norm2: nn.Module | None = None, mlp: nn.Module | None = None
    ):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp
        self.dropout1 = nn.Dropout(0.0)
        self.dropout2 = nn.Dropout(0.0)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.dropout1(self.mixer(self.norm1(x_BLD), mask_BL))
        if self.mlp is not None and self.norm2 is not None:
            x_BLD = x_BLD + self.dropout2(self.mlp(self.norm2(x_BLD)))
        return x_BLD
