"""Regression: values of a sequence, or signal tracks along it."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.data.base import Batch
from genossm.data.examples import Target
from genossm.models.classifier import Classifier
from genossm.optim import Optim
from genossm.tasks.supervised import Supervised


class Regression(Supervised):
    """Mean squared error of standardised values; what is measured and returned is on the scale of the data.

    Args:
        model, optim, steps, target, conjoin, layer_decay: see `Supervised`.
        mean, scale: of each output over the training rows; the model learns (value - mean) / scale, and both are
            folded into its last layer by `fold`.
    """

    kinds = ("regression", "tracks")

    def __init__(
        self,
        model: Classifier,
        optim: Optim,
        steps: int,
        target: Target,
        conjoin: str = "none",
        layer_decay: float = 1.0,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ):
        super().__init__(model, optim, steps, target, conjoin, layer_decay)
        count = len(target.names)
        self.register_buffer("mean_C", torch.tensor(mean or [0.0] * count), persistent=False)
        self.register_buffer("scale_C", torch.tensor(scale or [1.0] * count), persistent=False)
        self.mean_C: Tensor
        self.scale_C: Tensor
        self.unit_C = list(scale or [1.0] * count)

    def answer(self, batch: Batch, both: bool) -> Tensor:
        return super().answer(batch, both) * self.scale_C + self.mean_C

    def loss(self, outputs_MC: Tensor, targets: Tensor) -> Tensor:
        unit_C = outputs_MC.new_tensor(self.unit_C)
        return F.mse_loss(outputs_MC / unit_C, targets / unit_C)

    @torch.no_grad()
    def fold(self) -> None:
        """Put mean and scale into the head's last layer, so that the model alone answers on the scale of the data.

        Raises:
            ValueError: the last layer has no bias to take the mean.
        """
        out = cast(Classifier, self.model).head.out
        if out.bias is None:
            raise ValueError("A regression head needs a bias; set head.bias=true.")
        out.weight.mul_(self.scale_C[:, None])
        out.bias.mul_(self.scale_C).add_(self.mean_C)
        self.mean_C.zero_()
        self.scale_C.fill_(1)

    def flatten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.target.kind != "tracks":
            return outputs, targets
        counted_BP = ~targets.isnan().any(-1)
        return outputs[counted_BP], targets[counted_BP]
