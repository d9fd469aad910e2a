"""What every task does: run a backbone on a batch, a loss for training, sums over the whole split for evaluation."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from genossm.data.base import Batch
from genossm.data.transforms import IGNORED, Objective
from genossm.models.base import Backbone
from genossm.optim import Optim

_PIECE = 1 << 16
"""Targets whose logits exist at once."""
_LARGE = 1 << 22
"""Parameters from which a block is shared out by itself."""


class Task(L.LightningModule, ABC):
    """A backbone and what it is trained for.

    Args:
        model: the backbone.
        optim: optimizer and schedule.
        steps: optimizer steps of the whole run, which the schedule is computed from.
    """

    def __init__(self, model: Backbone, optim: Optim, steps: int):
        super().__init__()
        self.model = model
        self.optim = optim
        self.steps = steps

    def configure_model(self) -> None:
        """Share the weights out among the processes under `trainer=fsdp`."""
        if self.device_mesh is not None:
            share_out(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped once a step."""
        optimizer = self.optim.build(self)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LanguageModel(Task):
    """Cross-entropy of targets under the model's logits: what causal and masked language modelling share."""

    objective_name: ClassVar[str]

    def __init__(self, model: Backbone, optim: Optim, steps: int, objective: Objective):
        super().__init__(model, optim, steps)
        self.objective = objective
        self.nats = torch.nn.ModuleDict({f"{split}_split": MeanMetric() for split in ("val", "test")})
        self.accuracy = torch.nn.ModuleDict({f"{split}_split": MeanMetric() for split in ("val", "test")})

    @abstractmethod
    def check_model(self, model: Backbone) -> None:
        """Refuse a backbone that this task would train on what it already sees."""

    def evaluated(self, batch: Batch) -> Tensor:
        """Return which positions evaluation counts, (B, L): here every target."""
        return batch["targets"] != IGNORED

    def losses(self, batch: Batch, counted_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each target in nats, whether it was guessed, and its weight, one row a counted target."""
        x_MD = self.model(batch["ids_BL"], batch.get("lengths_B"))[counted_BL]
        targets_M = batch["targets"][counted_BL].long()
        # A long row's logits are never whole: each piece's are made again in the backward pass.
        pieces = zip(x_MD.split(_PIECE), targets_M.split(_PIECE), strict=True)
        again = torch.is_grad_enabled() and len(x_MD) > _PIECE
        found = [
            checkpoint(self._guess, *piece, use_reentrant=False) if again else self._guess(*piece) for piece in pieces
        ]
        nats_M, guessed_M = (torch.cat(parts) for parts in zip(*found, strict=True))
        weights_BL = batch.get("weights_BL")
        return nats_M, guessed_M, torch.ones_like(nats_M) if weights_BL is None else weights_BL[counted_BL]

    def _guess(self, x_MD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        logits_MV = self.model.logits(x_MD).float()
        return F.cross_entropy(logits_MV, targets_M, reduction="none"), logits_MV.argmax(-1) == targets_M

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the weighted mean loss in nats a target."""
        nats_M, _, weights_M = self.losses(batch, batch["targets"] != IGNORED)
        loss = (nats_M * weights_M).sum() / weights_M.sum().clamp(min=1e-6)
        self.log_dict({"train/loss": loss.detach(), "train/bits": loss.detach() / math.log(2)})
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        """Add a batch to the sums of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, index: int) -> None:
        """Add a batch to the sums of the test split."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        nats_M, guessed_M, _ = self.losses(batch, self.evaluated(batch))
        if len(nats_M):
            nats, accuracy = self._sums(split)
            nats.update(nats_M)
            accuracy.update(guessed_M.float())

    def _sums(self, split: str) -> tuple[MeanMetric, MeanMetric]:
        return cast(MeanMetric, self.nats[f"{split}_split"]), cast(MeanMetric, self.accuracy[f"{split}_split"])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the whole split, not over its batches."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean over the whole split, not over its batches."""
        self._log("test")

    def _log(self, split: str) -> None:
        nats, accuracy = (metric.compute() for metric in self._sums(split))
        for metric in self._sums(split):
            metric.reset()
        self.log_dict({f"{split}/loss": nats, f"{split}/bits": nats / math.log(2), f"{split}/accuracy": accuracy})


def share_out(model: Backbone, mesh: Any = None) -> None:
    """Share a backbone's weights out among processes (FSDP2); a large block is gathered by itself, when it is its turn.

    What a small one would save is less than what waiting for it costs: blocks below `_LARGE` parameters come together.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    large = [block for block in model.layers if sum(p.numel() for p in block.parameters()) >= _LARGE]
    for part in (*large, model):
        if not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh)
