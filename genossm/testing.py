"""What tests, ours and users', compare with: one tolerance table by dtype, the same everywhere."""

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
"""(absolute, relative) tolerance of a result of each dtype; the absolute one is scaled by the largest true value."""


def assert_close(got: Tensor, truth: Tensor, name: str = "result", dtype: torch.dtype | None = None) -> None:
    """Compare a tensor with its truth, in float64, under the tolerance of its own dtype.

    Args:
        got: what was computed.
        truth: what it should be, of any dtype of at least that precision.
        name: what the message calls it.
        dtype: whose tolerance to take instead of that of `got`.

    Raises:
        AssertionError: a shape differs, a value is not finite where the truth is, or differs by more than allowed.
    """
    absolute, relative = TOLERANCE[dtype or got.dtype]
    scale = float(truth.detach().abs().max()) if truth.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double().cpu(),
        truth.detach().double().cpu(),
        atol=absolute * max(1.0, scale),
        rtol=relative,
        msg=lambda text: f"{name}: {text}",
    )
