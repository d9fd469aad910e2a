"""Models as tools of attribution see them: one-hot DNA in, numbers out, with gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genossm.models.base import Backbone
from genossm.models.classifier import Classifier


class OneHotAdapter(nn.Module):
    """A model that takes one-hot DNA (B, 4, L), rows A, C, G, T, so that captum and tangermeme run on it unchanged.

    A column that is no unit vector (a gradient's path, a mixture) gets the mixture of the bases' embeddings.

    Args:
        model: a backbone, or a fine-tuned model, whose answers are then what comes out.
        read: makes (B, C) of a backbone's hidden states (B, L, D); by default their mean over the positions.

    Raises:
        ValueError: the model has not one token a base.
    """

    def __init__(self, model: Backbone | Classifier, read: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.backbone = model.backbone if isinstance(model, Classifier) else model
        self.head = model.head if isinstance(model, Classifier) else None
        self.read = read
        # Tools set the mode that they found here again when they are done: it must be the model's own.
        self.train(model.training)
        if self.backbone.config.tokenizer != "char":
            raise ValueError(
                "One-hot DNA needs a model with one token a base (tokenizer 'char'); got"
                f" {self.backbone.config.tokenizer!r}."
            )

    def forward(self, onehot_B4L: Tensor) -> Tensor:
        """Return (B, C).

        Raises:
            ValueError: the input is not (B, 4, L).
        """
        if onehot_B4L.ndim != 3 or onehot_B4L.shape[1] != 4:
            raise ValueError(f"One-hot DNA must be (batch, 4, length); got {tuple(onehot_B4L.shape)}.")
        ids_41 = torch.arange(7, 11, device=onehot_B4L.device)[:, None]
        # Through embed, so that models whose embedding holds both strands are read as they are.
        table_4D = self.backbone.embed(ids_41)[:, 0]
        x_BLD = self.backbone.run_layers(onehot_B4L.transpose(1, 2).to(table_4D.dtype) @ table_4D)
        x_BLD = self.backbone.norm_f(x_BLD)
        if self.head is not None:
            return self.head(x_BLD)
        return self.read(x_BLD) if self.read is not None else x_BLD.mean(1)
