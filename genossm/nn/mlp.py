"""Position-wise networks."""

from torch import Tensor, nn

from genossm.ops.gelu import gelu


class MLP(nn.Module):
    """Two linear layers with a tanh-approximate GELU between them: D -> F -> D."""

    def __init__(self, d_model: int, d_inner: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_inner, bias=bias)
        self.fc2 = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x_BLD)))
