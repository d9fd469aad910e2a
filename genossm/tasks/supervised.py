"""What classification and regression share: a backbone under a head, metrics over the whole split, both strands."""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from genossm.data.base import Batch
from genossm.data.examples import Target
from genossm.dna.tokenizer import CharTokenizer
from genossm.models.classifier import Classifier
from genossm.nn.rc import complement_tensor, reverse_complement, reversed_rows
from genossm.optim import AdamW, Optim, decayed_parameters
from genossm.tasks.base import Task
from genossm.tasks.metrics import SplitMetrics

CONJOIN = ("none", "eval", "always")


class Supervised(Task):
    """A backbone and a head, trained on labels.

    Args:
        model: the backbone and its head; of its parameters only those that require a gradient are trained.
        optim: optimizer and schedule.
        steps: optimizer steps of the whole run.
        target: what is predicted.
        conjoin: average the answers of both strands: "none", "eval" (Caduceus-Ph: train on one strand, evaluate on
            both) or "always".
        layer_decay: each block's learning rate over that of the block above it (1: all the same); the head has the
            full rate.

    Raises:
        ValueError: an unknown way to conjoin, or both strands asked of a target along the sequence or of a tokenizer
            that joins bases.
    """

    kinds: ClassVar[tuple[str, ...]]
    """Kinds of target that the task trains on."""

    def __init__(
        self,
        model: Classifier,
        optim: Optim,
        steps: int,
        target: Target,
        conjoin: str = "none",
        layer_decay: float = 1.0,
    ):
        super().__init__(cast(Any, model), optim, steps)
        if target.kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} trains on {', '.join(self.kinds)}; the target is {target.kind}.")
        if conjoin not in CONJOIN:
            raise ValueError(f"conjoin must be one of {', '.join(CONJOIN)}; got {conjoin!r}.")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1]; got {layer_decay}.")
        if conjoin != "none" and model.backbone.config.tokenizer != CharTokenizer.name:
            raise ValueError("conjoin needs one token a base; this model's tokenizer joins several.")
        self.target, self.conjoin, self.layer_decay = target, conjoin, layer_decay
        self.measured = nn.ModuleDict({f"{split}_split": SplitMetrics(target) for split in ("val", "test")})
        self.losses = nn.ModuleDict({f"{split}_split": _mean() for split in ("val", "test")})
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Outputs and targets of the last test, in the order of the loader."""

    def train(self, mode: bool = True) -> "Supervised":
        """Set training mode; a frozen backbone stays in evaluation mode, dropout off."""
        super().train(mode)
        backbone = cast(Classifier, self.model).backbone
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            backbone.eval()
        return self

    @property
    def metric_names(self) -> list[str]:
        """Names of what is measured besides the loss."""
        return [name.removeprefix("metric_") for name in cast(SplitMetrics, self.measured["val_split"]).metrics]

    @abstractmethod
    def loss(self, outputs_MC: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of flattened outputs."""

    def answer(self, batch: Batch, both: bool) -> Tensor:
        """Return the answers to a batch, averaged over the two strands where `both` is set."""
        ids_BL, lengths_B = batch["ids_BL"], batch.get("lengths_B")
        classifier = cast(Any, self.model)
        outputs: Tensor = classifier(ids_BL, lengths_B)
        if not both:
            return outputs
        other = classifier(other_strand(ids_BL, lengths_B), lengths_B)
        if self.target.along:
            other = reversed_rows(other, None if lengths_B is None else lengths_B // self.target.bin)
        return (outputs + other) / 2

    def flatten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return one row a counted target: of the sequences, or of the positions or bins that have one."""
        return outputs, targets

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss."""
        outputs_MC, targets = self.flatten(self.answer(batch, self.conjoin == "always"), batch["targets"])
        return self.loss(outputs_MC.float(), targets)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the mean loss."""
        loss = self.step_loss(batch)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        """Add a batch to the sums of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, index: int) -> None:
        """Add a batch to the sums of the test split and keep its answers."""
        outputs, targets = self._evaluate(batch, "test")
        self.kept.append((outputs.float().cpu(), targets.cpu()))

    def _evaluate(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        outputs_MC, targets = self.flatten(self.answer(batch, self.conjoin != "none"), batch["targets"])
        if len(targets):
            cast(Any, self.losses[f"{split}_split"]).update(self.loss(outputs_MC.float(), targets), len(targets))
            cast(SplitMetrics, self.measured[f"{split}_split"]).update(outputs_MC, targets)
        return outputs_MC, targets

    def on_test_epoch_start(self) -> None:
        """Forget the answers of an earlier test."""
        self.kept = []

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log("test")

    def _log(self, split: str) -> None:
        metrics, loss = cast(SplitMetrics, self.measured[f"{split}_split"]), cast(Any, self.losses[f"{split}_split"])
        values = {"loss": loss.compute(), **metrics.compute()}
        metrics.reset()
        loss.reset()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()})

    def configure_model(self) -> None:
        """Refuse to share the weights out: heads and the best epoch are read whole.

        Raises:
            ValueError: that was asked for.
        """
        if self.device_mesh is not None:
            raise ValueError("Fine-tuning needs whole weights in every process; take trainer=ddp instead of fsdp.")

    def configure_optimizers(self) -> Any:
        """Return AdamW with a rate for each depth and its schedule, stepped once a step."""
        optimizer = self.optim.build(self)
        if self.layer_decay < 1:
            optimizer = AdamW(self._groups(), lr=self.optim.lr, betas=self.optim.betas, eps=self.optim.eps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        classifier = cast(Classifier, self.model)
        depth = {p: number for number, layer in enumerate(classifier.backbone.layers) for p in layer.parameters()}
        last = len(classifier.backbone.layers)
        head = set(classifier.head.parameters()) | set(classifier.backbone.norm_f.parameters())
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for parameter, decays in decayed_parameters(self):
            # The embedding lies below the first block.
            below = last - depth.get(parameter, last if parameter in head else -1)
            group = groups.setdefault(
                (below, decays),
                {
                    "params": [],
                    "lr": self.optim.lr * self.layer_decay**below,
                    "weight_decay": self.optim.weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())


def other_strand(ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Return the reverse complement of character ids; padding stays on the right."""
    complement_V = complement_tensor(CharTokenizer.complement_map, len(CharTokenizer.vocabulary))
    return reverse_complement(ids_BL, complement_V.to(ids_BL.device), lengths_B)


def _mean() -> nn.Module:
    from torchmetrics import MeanMetric

    return MeanMetric()
