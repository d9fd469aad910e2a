"""Masked language modelling: hidden bases from both sides (or from the left, for a causal backbone)."""

from torch import Tensor

from genossm.data.base import Batch
from genossm.data.transforms import MaskTokens
from genossm.dna.tokenizer import CharTokenizer
from genossm.models.base import Backbone
from genossm.optim import Optim
from genossm.tasks.base import LanguageModel


class MaskedLM(LanguageModel):
    """Prediction of masked bases: trained on every target, evaluated on those that are `[MASK]`.

    Args:
        model, optim, steps: see `Task`.
        fraction: share of the bases that are targets.
        mask, random: shares of the targets that become `[MASK]` or a random base; the rest stays.
        train_fraction: share in training alone, where it differs from that of evaluation.
    """

    objective_name = "masked"

    def __init__(
        self,
        model: Backbone,
        optim: Optim,
        steps: int,
        fraction: float = 0.15,
        mask: float = 0.8,
        random: float = 0.1,
        train_fraction: float | None = None,
    ):
        objective = MaskTokens(fraction=fraction, mask=mask, random=random, train_fraction=train_fraction)
        super().__init__(model, optim, steps, objective)
        self.hides = mask > 0

    def evaluated(self, batch: Batch) -> Tensor:
        # Where the base, or a random one, still stands it says something of the target, which no context model is told.
        targets_BL = super().evaluated(batch)
        hidden_BL = targets_BL & (batch["ids_BL"] == CharTokenizer.mask_id)
        return hidden_BL if self.hides else targets_BL

    def check_model(self, model: Backbone) -> None:
        # A causal backbone may be trained this way: it sees less than it could, nothing that it should not.
        del model
