"""Classification: one of several classes, or any of several labels, for a sequence or for each base."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.data.examples import Target
from genossm.data.transforms import IGNORED
from genossm.models.classifier import Classifier
from genossm.optim import Optim
from genossm.tasks.supervised import Supervised


class Classification(Supervised):
    """Cross-entropy of classes (binary, multiclass, per_base) or of independent labels (multilabel).

    Args:
        model, optim, steps, target, conjoin, layer_decay: see `Supervised`.
        class_weights: weight of each class in the loss, in the order of the names; None weighs all alike.
        label_smoothing: share of each target that is spread over all classes.

    Raises:
        ValueError: the weights are not as many as the classes or not positive; see also `Supervised`.
    """

    kinds = ("binary", "multiclass", "multilabel", "per_base")

    def __init__(
        self,
        model: Classifier,
        optim: Optim,
        steps: int,
        target: Target,
        conjoin: str = "none",
        layer_decay: float = 1.0,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, optim, steps, target, conjoin, layer_decay)
        if class_weights is not None and (len(class_weights) != len(target.names) or min(class_weights) <= 0):
            raise ValueError(
                f"class_weights needs a positive weight for each of {', '.join(target.names)}; got"
                f" {list(class_weights)}."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}.")
        weight_C = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight_C", weight_C, persistent=False)
        self.weight_C: Tensor | None
        self.label_smoothing = label_smoothing

    def loss(self, outputs_MC: Tensor, targets: Tensor) -> Tensor:
        if self.target.kind == "multilabel":
            smooth = targets * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
            return F.binary_cross_entropy_with_logits(outputs_MC, smooth, pos_weight=self.weight_C)
        return F.cross_entropy(outputs_MC, targets.long(), self.weight_C, label_smoothing=self.label_smoothing)

    def flatten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.target.kind != "per_base":
            return outputs, targets
        counted_BL = targets != IGNORED
        return outputs[counted_BL], targets[counted_BL].long()


def balanced_weights(targets: Sequence[int], count: int) -> list[float]:
    """Return a weight for each class so that all weigh the same in sum, with mean 1 over the rows."""
    rows = torch.bincount(torch.tensor(targets), minlength=count).float()
    return (len(targets) / (count * rows.clamp(min=1))).tolist()
