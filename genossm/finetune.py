"""Fine-tuning: a backbone and a head on labelled sequences; `genossm train experiment=finetune`, or `finetune(...)`."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from genossm import adapters, callbacks, checkpoint
from genossm.data.examples import Labelled, LabelledData, Target
from genossm.data.leakage import drop_leaks
from genossm.data.protocols import divide
from genossm.data.sequences import Sequences
from genossm.dna.tokenizer import tokenizer_named
from genossm.files import write_atomically
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.optim import Optim
from genossm.tasks.classification import Classification, balanced_weights
from genossm.tasks.metrics import bootstrap, default_metric, mode_of, reported_metric
from genossm.tasks.regression import Regression
from genossm.tasks.supervised import Supervised
from genossm.train import (
    TrainResult,
    build_loggers,
    build_model,
    build_trainer,
    close_loggers,
    compose,
    fast_steps,
    gone_unless_begun,
    quieten,
    run_folder,
    step_of,
)

logger = logging.getLogger(__name__)

WAYS = ("full", "head", "lora")


@dataclass(frozen=True)
class FinetuneResult(TrainResult):
    """What fine-tuning gives back besides: `metrics` are of the best validation epoch, `model` is a `Classifier`."""

    interval: tuple[float, float]
    """Bootstrap confidence interval (95 %) of the test metric that chose the epoch."""
    monitor: str
    protocol: str


def finetune(table: Any, pretrained: str | Path | None = None, overrides: Sequence[str] = ()) -> FinetuneResult:
    """Fine-tune a model on labelled sequences.

    Args:
        table: path of a table (see `genossm.data.table.Table`), a data frame with the same columns, or any
            `LabelledData`.
        pretrained: folder of a model; None trains from fresh weights.
        overrides: as on the command line: `["model=caduceus", "finetune=lora", "epochs=5"]`.

    Returns:
        The run's folder, the model with its head, and its metrics.

    Raises:
        ValueError, FileNotFoundError: a value or a file is wrong; the message says which and what is allowed.
    """
    given = ["experiment=finetune", *overrides]
    if pretrained is not None:
        given.append(f"model.pretrained='{pretrained}'")
    if isinstance(table, LabelledData):
        return run(compose(given), table)
    if isinstance(table, str | Path):
        return run(compose([*given, f"data.table='{table}'"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.csv"
        table.to_csv(path, index=False)
        return run(compose([*given, f"data.table='{path}'"]))


def run(config: DictConfig, dataset: LabelledData | None = None) -> FinetuneResult:
    """Run what a composed config with `experiment=finetune` describes.

    Args:
        config: `conf/train.yaml` with `conf/experiment/finetune.yaml`.
        dataset: takes the place of the config's `data` group.

    Returns:
        The folder, which holds config.yaml, metrics.csv, result.json, predictions.csv, checkpoints/ and model/, the
        model and the metrics.
    """
    folder, resumed = run_folder(config)
    with gone_unless_begun(folder, resumed):
        return _run(config, dataset, folder, resumed)


def _run(config: DictConfig, dataset: LabelledData | None, folder: Path, resumed: bool) -> FinetuneResult:
    from hydra.utils import instantiate

    began = time.monotonic()
    quieten()
    if config.quiet:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.finetune not in WAYS:
        raise ValueError(f"finetune must be one of {', '.join(WAYS)}; got {config.finetune!r}.")
    labelled = (dataset or instantiate(config.data, _convert_="all")).load()
    holdout: dict[str, Any] = OmegaConf.to_container(config.holdout, resolve=True)  # type: ignore[assignment]
    splits, protocol = divide(labelled, config.protocol, config.seed, **holdout)
    for name in ("val", "test"):
        splits[name], gone = drop_leaks(splits["train"], splits[name], config.dedup)
        if gone:
            labelled.notes.append(f"dedup={config.dedup} took {len(gone):,} of {name} that train gives away")
        if not splits[name]:
            raise ValueError(f"dedup={config.dedup} leaves no {name} row: train gives them all away.")
    say(config, labelled, protocol, splits)
    L.seed_everything(config.seed, workers=True, verbose=False)
    backbone = build_model(config.model)
    data = build_data(config, splits, labelled.target, backbone)
    model = Classifier(backbone, head_config(config, labelled.target, backbone))
    adapted = prepare(model, config)
    accumulate = int(config.trainer.accumulate_grad_batches)
    per_epoch = max(1, data.of("train").per_pass // accumulate)
    steps = int(config.trainer.max_steps or config.epochs * per_epoch)
    data.batches = steps * accumulate
    optim: Optim = instantiate(config.optim, _convert_="all")
    task = build_task(config, model, optim, steps, labelled.target, data)
    task.record = bool(config.record)
    monitor = f"val/{config.monitor if config.monitor != 'auto' else default_metric(labelled.target.kind)}"
    known = ["loss", *task.metric_names]
    if monitor.removeprefix("val/") not in known:
        raise ValueError(f"A {labelled.target.kind} target has no metric {config.monitor!r}; there are: {known}.")
    trainer, table, saver = _trainer(config, folder, steps, min(per_epoch * accumulate, data.batches), monitor)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    start = callbacks.last_good(saver.folder) if resumed else None
    if start is not None:
        table.forget_from(step_of(start))
    with fast_steps(config.trainer):
        trainer.fit(task, datamodule=data, ckpt_path=start, weights_only=True)
    _take_best(task, saver.folder)
    if adapted is not None:
        adapters.save_adapters(adapted, model.head.config, folder / "adapter")
        task.model = cast(Any, adapters.merge(adapted))
    if isinstance(task, Regression):
        task.fold()
    metrics = _measure(trainer, task, data)
    outputs, targets = _in_order(task, data)
    interval = bootstrap(labelled.target, outputs, targets, reported_metric(monitor, labelled.target.kind))
    metrics |= {"steps": float(steps), "seconds": time.monotonic() - began}
    result = FinetuneResult(folder, cast(Classifier, task.model).eval(), metrics, interval, monitor, protocol)
    if trainer.is_global_zero:
        table.save()
        _write(result, config, labelled, splits, outputs, targets)
    close_loggers(trainer)
    return result


def say(config: DictConfig, labelled: Labelled, protocol: str, splits: dict[str, Any]) -> None:
    """Print what is trained on what."""
    if config.quiet:
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(labelled.describe())
    rows = ", ".join(f"{len(part):,} {name}" for name, part in splits.items())
    console.print(f"protocol {protocol}: {rows}")
    for note in labelled.notes:
        console.print(f"note: {note}")


def build_data(config: DictConfig, splits: dict[str, Any], target: Target, backbone: Backbone) -> Sequences:
    """Return the data module that the `loader` section describes."""
    loader: dict[str, Any] = OmegaConf.to_container(config.loader, resolve=True)  # type: ignore[assignment]
    tokenizer = tokenizer_named(backbone.config.tokenizer)
    longest = None if backbone.max_length is None else backbone.max_length * tokenizer.bases_per_token
    return Sequences(
        splits,
        target,
        batch_size=config.batch_size,
        longest=longest,
        seed=config.seed,
        tokenizer=tokenizer,
        **loader,
    )


def head_config(config: DictConfig, target: Target, backbone: Backbone) -> HeadConfig:
    """Return the head's shape: as asked, with one output a name and both strands where the backbone gives both."""
    asked: dict[str, Any] = OmegaConf.to_container(config.head, resolve=True)  # type: ignore[assignment]
    if target.along:
        asked["pooling"] = "none"
    elif asked["pooling"] == "none":
        raise ValueError(f"head.pooling=none answers each base; the target is {target.kind}, one a sequence.")
    return HeadConfig(
        n_outputs=len(target.names),
        names=target.names,
        kind=target.kind,
        bin=target.bin,
        strands=2 if backbone.equivariant else 1,
        **asked,
    )


def prepare(model: Classifier, config: DictConfig) -> Any:
    """Freeze what is not trained; returns the peft model under `finetune=lora`, else None."""
    if config.finetune == "lora":
        return adapters.add_adapters(model, **cast(Any, OmegaConf.to_container(config.lora)))
    if config.finetune == "head":
        model.backbone.requires_grad_(False)
    elif model.backbone.lm_head is not None:
        # The language-model head is not used, and what has no gradient stops several processes.
        model.backbone.lm_head.requires_grad_(False)
    model.backbone.gradient_checkpointing = bool(config.gradient_checkpointing)
    return None


def build_task(
    config: DictConfig, model: Classifier, optim: Optim, steps: int, target: Target, data: Sequences
) -> Supervised:
    """Return the task for a kind of target, with the options of the `supervised` section that concern it."""
    options: dict[str, Any] = OmegaConf.to_container(config.supervised, resolve=True)  # type: ignore[assignment]
    weights, smoothing = options.pop("class_weights"), options.pop("label_smoothing")
    rows = data.splits["train"].targets
    if target.kind in Regression.kinds:
        if weights is not None or smoothing:
            raise ValueError(f"class_weights and label_smoothing are for classes; the target is {target.kind}.")
        values = np.concatenate([np.asarray(r, np.float64).reshape(-1, len(target.names)) for r in rows])
        mean, scale = np.nanmean(values, 0), np.nanstd(values, 0)
        return Regression(
            model, optim, steps, target, **options, mean=mean.tolist(), scale=np.where(scale > 0, scale, 1.0).tolist()
        )
    if weights == "balanced":
        if target.kind == "multilabel":
            raise ValueError("class_weights=balanced is for one class a row; give multilabel a list of weights.")
        labels = np.concatenate(rows) if target.kind == "per_base" else np.array(rows)
        weights = balanced_weights(labels.tolist(), len(target.names))
    elif isinstance(weights, str):
        raise ValueError(f"class_weights must be null, balanced or a list of numbers; got {weights!r}.")
    return Classification(model, optim, steps, target, **options, class_weights=weights, label_smoothing=smoothing)


class EpochLines(Callback):
    """Prints one line a validation: step, losses, the metric that chooses the epoch, and the time left."""

    def __init__(self, monitor: str, steps: int):
        self.monitor, self.steps, self.began = monitor, steps, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        from rich.console import Console

        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        passed = time.monotonic() - self.began
        left = passed / max(1, trainer.global_step) * (self.steps - trainer.global_step)
        Console(highlight=False).print(
            f"step {trainer.global_step}/{self.steps}  train/loss {values.get('train/loss', float('nan')):.3f}"
            f"  val/loss {values['val/loss']:.3f}  {self.monitor} {values[self.monitor]:.4f}  {left:.0f} s left"
        )


def _trainer(
    config: DictConfig, folder: Path, steps: int, every: int, monitor: str
) -> tuple[L.Trainer, callbacks.MetricsTable, callbacks.Checkpointing]:
    from hydra.utils import instantiate

    values: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    values |= {"max_steps": steps, "val_check_interval": every}
    # A short epoch is logged too.
    values["log_every_n_steps"] = min(values["log_every_n_steps"], every)
    table = callbacks.MetricsTable(folder / "metrics.csv")
    saver = callbacks.Checkpointing(folder / "checkpoints", int(config.save_every), monitor, mode_of(monitor))
    chosen: list[Callback] = [callbacks.StopAtNaN(), saver, *instantiate(list(config.callbacks.values()))]
    if config.patience is not None:
        chosen.append(EarlyStopping(monitor, patience=int(config.patience), mode=mode_of(monitor)))
    if not config.quiet:
        chosen.append(EpochLines(monitor, steps))
    return build_trainer(values, [table, *build_loggers(config, folder)], chosen), table, saver


def _take_best(task: Supervised, folder: Path) -> None:
    best = folder / "best.ckpt"
    if not best.exists():
        raise RuntimeError(f"{folder} holds no best.ckpt: the validation metric was never a finite number.")
    task.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])


def _measure(trainer: L.Trainer, task: Supervised, data: Sequences) -> dict[str, float]:
    values = dict(trainer.validate(task, datamodule=data, verbose=False)[0])
    return values | dict(trainer.test(task, datamodule=data, verbose=False)[0])


def _in_order(task: Supervised, data: Sequences) -> tuple[Tensor, Tensor]:
    """Return the answers of the test in the order of its rows (along the sequence: one row a base, as loaded)."""
    outputs = torch.cat([output for output, _ in task.kept])
    targets = torch.cat([target for _, target in task.kept])
    batches = data.of("test")
    order = torch.from_numpy(np.concatenate([batches.numbers(i) for i in range(len(batches))]))
    if len(order) != len(outputs):
        return outputs, targets
    back = torch.argsort(order)
    return outputs[back], targets[back]


def _write(
    result: FinetuneResult,
    config: DictConfig,
    labelled: Labelled,
    splits: dict[str, Any],
    outputs_MC: Tensor,
    targets: Tensor,
) -> None:
    target = labelled.target
    notes = {"metrics": result.metrics, "protocol": result.protocol, "data": labelled.title, "target": target.kind}
    checkpoint.save(result.model, result.folder / "model", notes)
    values = {
        **notes,
        "monitor": result.monitor,
        "interval": result.interval,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "seed": config.seed,
        "names": target.names,
    }
    write_atomically(result.folder / "result.json", lambda path: path.write_text(json.dumps(values, indent=2) + "\n"))
    if len(outputs_MC) == len(splits["test"]) and not target.along:
        _write_predictions(result.folder / "predictions.csv", splits["test"], target, outputs_MC)
    (result.folder / "finished").touch()
    os.environ.pop("GENOSSM_RUN_FOLDER", None)
    if not config.quiet:
        _report(result, target)


def _write_predictions(path: Path, rows: Sequence[Any], target: Target, outputs_MC: Tensor) -> None:
    import csv

    answers = outputs_MC.softmax(-1) if target.chooses else outputs_MC
    answers = answers.sigmoid() if target.kind == "multilabel" else answers

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["row", "name", "interval", "target", *target.names])
            for number, (row, values) in enumerate(zip(rows, answers.tolist(), strict=True)):
                truth = target.names[row.target] if target.chooses else ";".join(f"{v:g}" for v in row.target)
                writer.writerow([number, row.name, row.interval or "", truth, *(f"{v:.6g}" for v in values)])

    write_atomically(path, write)


def _report(result: FinetuneResult, target: Target) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{target.kind}, protocol {result.protocol}, best epoch by {result.monitor}")
    for name in ("metric", "val", "test"):
        shown.add_column(name, justify="left" if name == "metric" else "right")
    for name, value in result.metrics.items():
        if name.startswith("test/"):
            metric = name.removeprefix("test/")
            own = metric == reported_metric(result.monitor, target.kind)
            spread = f"  [{result.interval[0]:.4f}, {result.interval[1]:.4f}]" if own else ""
            shown.add_row(metric, f"{result.metrics[f'val/{metric}']:.4f}", f"{value:.4f}{spread}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(shown)
    console.print(f"{result.metrics['seconds']:.0f} s; {result.folder}")
