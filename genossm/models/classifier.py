"""A backbone under a head: one answer a sequence, for classification and regression."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from genossm.models.base import Backbone
from genossm.nn.head import HeadConfig, SequenceHead


class Classifier(nn.Module):
    """A backbone and its sequence head.

    Args:
        backbone: what reads the sequence.
        config: the head's shape.
    """

    def __init__(self, backbone: Backbone, config: HeadConfig):
        super().__init__()
        self.backbone = backbone
        self.head = SequenceHead(backbone.d_output, config)

    def forward(
        self, ids_BLS: Integer[Tensor, "B L *S"], lengths_B: Integer[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B *P C"]:
        """Return the answers to a batch: y_BC, or y_BPC where the head answers each position.

        Args:
            ids_BLS: ids (B, L), or (B, L, 2): a sequence and its reverse complement, whose answers are averaged.
            lengths_B: number of real tokens of each row; None: all are real.
        """
        if ids_BLS.ndim == 2:
            return self.answer(ids_BLS, lengths_B)
        if self.head.config.along:
            raise ValueError("A head that answers each position takes one strand; average the two outside.")
        strands = [self.answer(ids_BL, lengths_B) for ids_BL in ids_BLS.unbind(-1)]
        return torch.stack(strands).mean(0)

    def answer(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return y_BC of one strand."""
        x_BLD = self.backbone(ids_BL, lengths_B)
        if self.head.config.pad_id is not None:
            lengths_B = ends_before(ids_BL, self.head.config.pad_id)
        return self.head(x_BLD, lengths_B)


def ends_before(ids_BL: Tensor, pad_id: int) -> Tensor:
    """Return how many ids of each row stand before its first `pad_id`; all where there is none or it stands first."""
    first_B = (ids_BL == pad_id).int().argmax(1)
    return torch.where(first_B == 0, ids_BL.shape[1], first_B)
