"""Causal language modelling: the next base from all before it."""

from genossm.data.transforms import NextToken
from genossm.models.base import Backbone
from genossm.optim import Optim
from genossm.tasks.base import LanguageModel


class CausalLM(LanguageModel):
    """Next-token prediction; N and special tokens are never a target."""

    objective_name = "causal"

    def __init__(self, model: Backbone, optim: Optim, steps: int):
        super().__init__(model, optim, steps, NextToken())

    def check_model(self, model: Backbone) -> None:
        if not model.causal:
            raise ValueError(
                f"{model.config.model_type} sees both sides of a position, so it can't be trained to predict the next"
                " token; use task=masked_lm."
            )
