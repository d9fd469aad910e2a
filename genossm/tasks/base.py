"""What every task does: run a backbone on a batch, a loss for training, sums over the whole split for evaluation."""

import functools
import logging
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from genossm.data.base import Batch
from genossm.data.transforms import IGNORED, Objective
from genossm.models.base import Backbone
from genossm.optim import Optim, clip_norm
from genossm.recording import Steps, record

logger = logging.getLogger(__name__)
_PIECE = 1 << 16
"""Targets whose logits exist at once."""
_NARROW = 256
"""Up to so many logits a position those of all positions cost less than picking out the targets' ones, on a GPU."""
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
        self.record = False
        """Record steps as CUDA graphs, for each kind of batch that comes a second time; on one GPU."""
        self._recorder: Steps | None = None

    @abstractmethod
    def training_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""

    def step_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch in training, recorded or not."""
        return self.training_loss(batch) if self._recorder is None else self._recorder.loss(cast(Any, batch))

    def on_train_start(self) -> None:
        """Begin to record, where that was asked for and can be."""
        self._recorder = None
        refusal = self._refusal() if self.record else None
        if refusal is not None:
            logger.warning("Steps are not recorded: %s", refusal)
        elif self.record:
            recorder = functools.partial(record, pool=torch.cuda.graph_pool_handle())
            share = self.trainer.accumulate_grad_batches
            self._recorder = Steps(self.training_loss, list(self.parameters()), share, recorder)

    def _refusal(self) -> str | None:
        """Return why steps can't be recorded, or None."""
        if self.device.type != "cuda":
            return f"that takes a GPU, and the model is on {self.device.type}."
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy):
            return "several processes train together; trainer.devices=1 records."
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return "losses of float16 are scaled by what the gradients were; trainer.precision=bf16-mixed records."
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            return "the model is compiled; compile=false records."
        return None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Give the parameters their gradients."""
        if self._recorder is None or not self._recorder.backward():
            super().backward(loss, *args, **kwargs)

    def configure_model(self) -> None:
        """Share the weights out among the processes under `trainer=fsdp`."""
        if self.device_mesh is not None:
            share_out(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped once a step."""
        optimizer = self.optim.build(self)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer says; the norm of weights that are shared out takes one message, not one a weight."""
        if self.device_mesh is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_norm((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)


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

    def losses(self, batch: Batch, counted_BL: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each target in nats, whether it was guessed, and its weight.

        There is one row a counted target; or, with None, one a position, of weight 0 where nothing is asked.
        """
        x_BLD, targets_BL, weights_BL = (
            self.model(batch["ids_BL"], batch.get("lengths_B")),
            batch["targets"],
            batch.get("weights_BL"),
        )
        if counted_BL is None:
            x_MD, targets_M = x_BLD.flatten(0, 1), targets_BL.flatten().long()
            asked_BL = targets_BL != IGNORED
            weights_M = (asked_BL.float() if weights_BL is None else weights_BL * asked_BL).flatten()
        else:
            x_MD, targets_M = x_BLD[counted_BL], targets_BL[counted_BL].long()
            weights_M = None if weights_BL is None else weights_BL[counted_BL]
        # A long row's logits are never whole: each piece's are made again in the backward pass.
        pieces = zip(x_MD.split(_PIECE), targets_M.split(_PIECE), strict=True)
        again = torch.is_grad_enabled() and len(x_MD) > _PIECE
        found = [
            checkpoint(self._guess, *piece, use_reentrant=False) if again else self._guess(*piece) for piece in pieces
        ]
        nats_M, guessed_M = (torch.cat(parts) for parts in zip(*found, strict=True))
        return nats_M, guessed_M, torch.ones_like(nats_M) if weights_M is None else weights_M

    def _guess(self, x_MD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        logits_MV = self.model.logits(x_MD).float()
        nats_M = F.cross_entropy(logits_MV, targets_M, reduction="none", ignore_index=IGNORED)
        return nats_M, logits_MV.argmax(-1) == targets_M

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the weighted mean loss in nats a target."""
        # How many positions have a target is a value: whoever must know it waits for the GPU.
        narrow = self.model.config.padded_vocab_size <= _NARROW and batch["ids_BL"].is_cuda
        every = narrow or self._recorder is not None
        nats_M, _, weights_M = self.losses(batch, None if every else batch["targets"] != IGNORED)
        return (nats_M * weights_M).sum() / weights_M.sum().clamp(min=1e-6)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the weighted mean loss in nats a target."""
        loss = self.step_loss(batch)
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
