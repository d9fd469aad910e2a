"""Metrics over a whole split, never means over its batches, and how far they could be off."""

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torchmetrics as tm
from torch import Tensor, nn

from genossm.data.examples import Target

MODES = {"loss": "min", "mse": "min"}
"""Metrics that are better when small; all others are better when large."""

DEFAULT = {"multilabel": "auprc", "regression": "pearson", "tracks": "pearson"}
"""What chooses the best epoch, by kind of target, unless the user says otherwise; classes take accuracy."""

_BINS = 200
"""Thresholds of the ranking metrics of per-base targets: every score of a split would not fit in memory."""


def default_metric(kind: str) -> str:
    """Return the name of the metric that chooses the best epoch."""
    return DEFAULT.get(kind, "accuracy")


def reported_metric(monitor: str, kind: str) -> str:
    """Return the metric of a run's tables: the one that chose its epoch, or the default where the loss did."""
    name = monitor.rpartition("/")[2]
    return default_metric(kind) if name == "loss" else name


def mode_of(metric: str) -> str:
    """Return "min" or "max": which way a metric is better."""
    return MODES.get(metric.rpartition("/")[2], "max")


class SplitMetrics(nn.Module):
    """All metrics of a kind of target, gathered over a split.

    accuracy, mcc, f1_macro, auroc, auprc (and f1_binary of the second class) for a choice of classes; accuracy,
    f1_macro, auroc, auprc for labels; pearson, spearman, r2, mse for values; pearson and mse for tracks.

    Args:
        target: what is predicted.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.target = target
        count = len(target.names)
        with warnings.catch_warnings():
            # Ranking metrics keep every score, and torchmetrics warns of it each time.
            warnings.simplefilter("ignore")
            found = _metrics(target, count)
        self.metrics = nn.ModuleDict({f"metric_{name}": metric for name, metric in found.items()})

    def update(self, outputs_MC: Tensor, targets: Tensor) -> None:
        """Add rows: logits and class indices (M,), logits and 0/1 (M, C), or values and values (M, C)."""
        outputs_MC = outputs_MC.detach().float()
        if self.target.chooses:
            outputs_MC = outputs_MC.softmax(-1)
        elif self.target.kind == "multilabel":
            outputs_MC, targets = outputs_MC.sigmoid(), targets.long()
        for name, metric in self._named():
            if name.endswith("_binary") or (self.target.kind == "binary" and name in ("auroc", "auprc")):
                metric.update(outputs_MC[:, 1], targets)
            elif self.target.kind in ("regression", "tracks") and len(self.target.names) == 1:
                metric.update(outputs_MC[:, 0], targets[:, 0])
            else:
                metric.update(outputs_MC, targets)

    def compute(self) -> dict[str, Tensor]:
        """Return each metric over all rows since the last reset; several outputs are averaged."""
        with warnings.catch_warnings():
            # A class without a row has no curve; torchmetrics says so and leaves it out of the mean.
            warnings.simplefilter("ignore")
            return {name: metric.compute().float().mean() for name, metric in self._named()}

    def reset(self) -> None:
        """Forget all rows."""
        for _, metric in self._named():
            metric.reset()

    def _named(self) -> list[tuple[str, tm.Metric]]:
        return [(name.removeprefix("metric_"), cast(tm.Metric, metric)) for name, metric in self.metrics.items()]


def _metrics(target: Target, count: int) -> dict[str, tm.Metric]:
    from torchmetrics import classification as tc

    if target.kind == "multilabel":
        return {
            "accuracy": tc.MultilabelAccuracy(count, average="micro"),
            "f1_macro": tc.MultilabelF1Score(count, average="macro"),
            "auroc": tc.MultilabelAUROC(count, average="macro"),
            "auprc": tc.MultilabelAveragePrecision(count, average="macro"),
        }
    if target.kind == "tracks":
        return {"pearson": tm.PearsonCorrCoef(num_outputs=count), "mse": tm.MeanSquaredError()}
    if target.kind == "regression":
        return {
            "pearson": tm.PearsonCorrCoef(num_outputs=count),
            "spearman": tm.SpearmanCorrCoef(num_outputs=count),
            "r2": tm.R2Score(),
            "mse": tm.MeanSquaredError(),
        }
    thresholds = _BINS if target.kind == "per_base" else None
    chosen: dict[str, tm.Metric] = {
        "accuracy": tc.MulticlassAccuracy(count, average="micro"),
        "mcc": tc.MulticlassMatthewsCorrCoef(count),
        "f1_macro": tc.MulticlassF1Score(count, average="macro"),
    }
    if target.kind == "binary":
        return chosen | {
            "f1_binary": tc.BinaryF1Score(),
            "auroc": tc.BinaryAUROC(),
            "auprc": tc.BinaryAveragePrecision(),
        }
    return chosen | {
        "auroc": tc.MulticlassAUROC(count, average="macro", thresholds=thresholds),
        "auprc": tc.MulticlassAveragePrecision(count, average="macro", thresholds=thresholds),
    }


def evaluate_outputs(target: Target, outputs_MC: Tensor, targets: Tensor) -> dict[str, float]:
    """Return every metric of a split's outputs at once."""
    metrics = SplitMetrics(target)
    metrics.update(outputs_MC, targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def bootstrap(
    target: Target, outputs_MC: Tensor, targets: Tensor, metric: str, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of a metric over rows drawn with replacement (percentile bootstrap).

    Args:
        target: what is predicted.
        outputs_MC, targets: as `SplitMetrics.update` takes them.
        metric: its name.
        draws: resamples.
        seed: what they are drawn from.

    Raises:
        KeyError: there is no such metric of this kind of target.
    """
    measure = _measure(target, metric)
    rng = np.random.default_rng(seed)
    values = [measure(outputs_MC[rows], targets[rows]) for rows in _draws(rng, len(targets), draws)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def _draws(rng: np.random.Generator, count: int, draws: int) -> list[Tensor]:
    return [torch.from_numpy(rng.integers(count, size=count)) for _ in range(draws)]


def _measure(target: Target, metric: str) -> Callable[[Tensor, Tensor], float]:
    """Return a function that computes one metric alone; those of a confusion matrix go through numpy, for speed."""
    if target.chooses and metric in ("accuracy", "mcc"):
        count = len(target.names)

        def counted(outputs_MC: Tensor, targets: Tensor) -> float:
            pairs = (targets.long() * count + outputs_MC.argmax(-1)).numpy()
            table = np.bincount(pairs, minlength=count * count).reshape(count, count)
            return float(np.trace(table) / table.sum()) if metric == "accuracy" else matthews(table)

        return counted
    alone: Any = SplitMetrics(target)
    names = [name.removeprefix("metric_") for name in alone.metrics]
    if metric not in names:
        raise KeyError(f"A {target.kind} target has no metric {metric!r}; it has: {', '.join(names)}.")
    for name in names:
        if name != metric:
            del alone.metrics[f"metric_{name}"]

    def measured(outputs_MC: Tensor, targets: Tensor) -> float:
        alone.reset()
        alone.update(outputs_MC, targets)
        return float(alone.compute()[metric])

    return measured


def matthews(table_TP: npt.NDArray[np.integer]) -> float:
    """Return the correlation of true and predicted classes (Gorodkin 2004) of a table with one row a true class."""
    table = table_TP.astype(np.float64)
    total, right = table.sum(), np.trace(table)
    true, predicted = table.sum(1), table.sum(0)
    below = math.sqrt((total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum()))
    return float((right * total - (true * predicted).sum()) / below) if below else 0.0
