"""The ops beside the form that the published code gives them."""

from collections.abc import Mapping

import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.benchmarks.published import long_convolution
from genossm.ops.fftconv import fftconv


def comparisons(device: torch.device) -> list[Comparison]:
    """Return every op's comparisons."""
    return [*long_convolutions(device)]


def long_convolutions(device: torch.device, width: int = 128) -> list[Comparison]:
    """Compare Hyena's long convolution at lengths as published (the context + 2) and at powers of two."""

    def build(length: int, backward: bool) -> Mapping[str, Run]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device).requires_grad_(backward)

        x_BDL, k_DL, skip_D = draw(1, width, length), draw(width, length), draw(width)
        grad_BDL = torch.ones_like(x_BDL)

        def published() -> object:
            y_BDL = long_convolution(x_BDL, k_DL, skip_D)
            return torch.autograd.grad(y_BDL, [x_BDL, k_DL, skip_D], grad_BDL) if backward else y_BDL

        def ours() -> object:
            y_BDL = fftconv(x_BDL.transpose(1, 2), k_DL, skip_D).transpose(1, 2)
            return torch.autograd.grad(y_BDL, [x_BDL, k_DL, skip_D], grad_BDL) if backward else y_BDL

        return {"published form": published, "genossm": ours}

    return [
        Comparison(
            name=f"long convolution, {width} x {length:,}, {'forward + backward' if backward else 'forward'}",
            build=lambda length=length, backward=backward: build(length, backward),
            tokens=length,
            # A power of two is not what the published models were trained at.
            targets={"genossm": {16_384: "", 16_386: "3x", 160_002: "3x, 1/3 of the memory"}[length]}
            if device.type == "cpu"
            else {},
        )
        for length in (16_384, 16_386, 160_002)
        for backward in (False, True)
    ]
