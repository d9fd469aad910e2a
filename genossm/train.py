"""`genossm train`: fit a task on a data module, from a Hydra config; fine-tuning is training with `pretrained=`."""

import contextlib
import ctypes
import logging
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genossm.config import compose as compose_verb
from genossm.config import launch, without_targets
from genossm.errors import is_users_mistake

logger = logging.getLogger(__name__)

_SHORT_STEP = 1 << 16
"""Tokens of a step up to which a GPU may be faster than Python asks it for the step's kernels."""
_RUN_FOLDER = "GENOSSM_RUN_FOLDER"
"""Hands the run's folder to the processes that Lightning starts for several devices."""


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back: its folder, the trained model and the metrics of its end."""

    folder: Path
    model: Any
    metrics: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Return plain values, for machines."""
        return {"folder": str(self.folder), "model": str(self.folder / "model"), "metrics": self.metrics}


def train(config: DictConfig) -> TrainResult:
    """Run what a composed config describes.

    Args:
        config: `conf/train.yaml` with its groups chosen; `genossm.train.compose` makes one from overrides.

    Returns:
        The folder, which holds config.yaml, metrics.csv, loss.png, checkpoints/ and model/, the model and the metrics.

    Raises:
        ValueError, FileNotFoundError: a value or file is wrong; the message says which and what is allowed.
    """
    if "finetune" in config:
        return _finetune(config)
    folder, resumed = run_folder(config)
    with gone_unless_begun(folder, resumed):
        return _train(config, folder, resumed)


@contextlib.contextmanager
def gone_unless_begun(folder: Path, resumed: bool) -> Iterator[None]:
    """Remove the folder of a new run that a user's mistake ends before anything is in it: resume=auto would take it."""
    try:
        yield
    except Exception as error:
        begun = resumed or (folder / "metrics.csv").exists() or any((folder / "checkpoints").glob("*"))
        if is_users_mistake(error) and not begun:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in list(folder.parents)[:2]:  # Of the experiment and of all, where this was their first run.
                with contextlib.suppress(OSError):
                    parent.rmdir()
        raise


def _train(config: DictConfig, folder: Path, resumed: bool) -> TrainResult:
    import lightning as L
    from hydra.utils import instantiate

    from genossm import callbacks, checkpoint

    began = time.monotonic()
    quieten()
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(config.model)
    steps = int(config.trainer.max_steps)
    optim = instantiate(config.optim, _convert_="all")
    task = instantiate(config.task, _convert_="all", _partial_=True)(model=model, optim=optim, steps=steps)
    task.check_model(model)
    trainer_values: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    accumulate = int(trainer_values["accumulate_grad_batches"])
    data = instantiate(config.data, _convert_="all", _partial_=True)(
        objective=task.objective, batches=steps * accumulate
    )
    check_context(model, config.data.length)
    table = callbacks.MetricsTable(folder / "metrics.csv")
    saver = callbacks.Checkpointing(folder / "checkpoints", int(config.save_every))
    trainer = build_trainer(
        trainer_values,
        [table, *build_loggers(config, folder)],
        [
            callbacks.StopAtNaN(),
            # Before the saver, whose checkpoints hold what they have come to.
            *instantiate(list(config.callbacks.values()), _convert_="all"),
            saver,
            callbacks.Progress(steps),
        ],
    )
    model.gradient_checkpointing = bool(config.gradient_checkpointing)
    task.record = bool(config.record)
    tokens = config.batch_size * config.length
    if on_gpu(trainer_values) and not config.record and tokens <= _SHORT_STEP:
        logger.info("A GPU may wait for Python in steps of %d tokens: try record=true (docs/data.md)", tokens)
    if config.compile:
        model.compile()
    start = resume_from(config, folder, trainer.is_global_zero) if resumed else None
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    table.forget_from(step_of(start) if start is not None else 0)
    with fast_steps(trainer_values):
        trainer.fit(task, datamodule=data, ckpt_path=start, weights_only=True)
    metrics = trainer.validate(task, datamodule=data, verbose=False)[0]
    if data.splits["test"]:
        metrics |= trainer.test(task, datamodule=data, verbose=False)[0]
    metrics["seconds"] = time.monotonic() - began
    model = whole(model)
    if trainer.is_global_zero:
        table.write()
        notes = {"metrics": metrics, "data": without_targets(OmegaConf.to_container(config.data, resolve=True))}
        checkpoint.save(model, folder / "model", notes)
        report(task, data, metrics, table, folder)
        (folder / "finished").touch()
    close_loggers(trainer)
    return TrainResult(folder, model, metrics)


def quieten() -> None:
    """Silence what Lightning says of our choices: few workers, short runs, a name that newer torch deprecates."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)


def _finetune(config: DictConfig) -> TrainResult:
    from genossm import finetune

    return finetune.run(config)


def run_folder(config: DictConfig) -> tuple[Path, bool]:
    """Return the folder of this run and whether it goes on with an earlier one.

    Raises:
        ValueError: `resume` is neither null, "auto" nor the folder of a run.
    """
    # First, since the variable may stem from an earlier run of the process that torchrun was started by.
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _agreed_folder(config)
    handed = os.environ.get(_RUN_FOLDER)
    if handed and int(os.environ.get("LOCAL_RANK", "0")):
        return Path(handed), config.resume is not None
    return _choose_folder(config)


def _agreed_folder(config: DictConfig) -> tuple[Path, bool]:
    """Return what the first of several processes that torchrun started has chosen."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    box: list[Any] = [_choose_folder(config) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _choose_folder(config: DictConfig) -> tuple[Path, bool]:
    root = Path(config.output) / str(config.name)
    folder = None
    if config.resume == "auto":
        open_runs = [p.parent for p in root.glob("*/config.yaml") if not (p.parent / "finished").exists()]
        folder = max(open_runs, default=None)
        if folder is None:
            logger.info("%s holds no unfinished run; starting a new one", root)
    elif config.resume is not None:
        folder = Path(config.resume)
        if not (folder / "config.yaml").exists():
            raise ValueError(f"resume must be auto or the folder of a run; {str(folder)!r} holds no config.yaml.")
    resumed = folder is not None
    if folder is None:
        folder = root / time.strftime("%Y-%m-%d_%H-%M-%S")
        attempt = 1
        while folder.exists():
            attempt += 1
            folder = root / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{attempt}"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    os.environ[_RUN_FOLDER] = str(folder.resolve())
    return folder, resumed


def resume_from(config: DictConfig, folder: Path, first_process: bool) -> Path | None:
    """Return the checkpoint of a run to go on from, or None where none was written yet.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    from genossm import callbacks

    if first_process:
        callbacks.clear_leftovers(folder / "checkpoints")
        began: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # type: ignore[assignment]
        now: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        changed = [key for key in {**began, **now} if key != "resume" and began.get(key) != now.get(key)]
        if changed:
            logger.warning("%s began with another %s than it goes on with", folder, ", ".join(changed))
    start = callbacks.last_good(folder / "checkpoints")
    if first_process:
        logger.info("resuming %s", start or f"{folder} from the beginning: no checkpoint was written yet")
    return start


def whole(model: Any) -> Any:
    """Return a backbone whose weights are all in this process, where training shared them out among several."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return model
    shared: Any = model
    weights = get_model_state_dict(shared, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    gathered = shared.config.build()
    if weights:  # Other processes than the first get nothing.
        gathered.load_state_dict(weights)
    return gathered.eval()


def build_model(values: DictConfig) -> Any:
    """Return the backbone that the `model` group describes: fresh, or `pretrained` from a folder."""
    from hydra.utils import instantiate

    from genossm import checkpoint

    plain: dict[str, Any] = OmegaConf.to_container(values, resolve=True)  # type: ignore[assignment]
    pretrained = plain.pop("pretrained", None)
    if pretrained:
        return checkpoint.load(pretrained).train()
    try:
        return instantiate(plain, _convert_="all").build()
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"model: {cause}") from None


def check_context(model: Any, length: int) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        ValueError: they are.
    """
    if model.max_length is not None and length > model.max_length:
        raise ValueError(
            f"length={length} is longer than the model's context of {model.max_length} tokens; shorten length or raise"
            " model.max_length."
        )


def build_trainer(values: dict[str, Any], loggers: list[Any], callbacks: list[Any]) -> Any:
    """Return the Lightning trainer of the `trainer` group; precision "auto" is bf16 on a GPU, else float32.

    Raises:
        ValueError: a count that must be at least 1 is not.
    """
    import lightning as L
    import torch
    from hydra.utils import instantiate

    for name in ("max_steps", "accumulate_grad_batches", "log_every_n_steps"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"trainer.{name} must be at least 1; got {values[name]}.")
    for name, least in (("val_check_interval", "more than 0"), ("gradient_clip_val", "at least 0")):
        value = values.get(name)
        if value is not None and (value < 0 or (value == 0 and name == "val_check_interval")):
            raise ValueError(f"trainer.{name} must be {least}; got {value}.")
    values = {name: value for name, value in values.items() if name != "_target_"}
    if isinstance(values["strategy"], dict):
        processes = values["devices"] if isinstance(values["devices"], int) else max(1, torch.cuda.device_count())
        values["strategy"] = instantiate(values["strategy"], data_parallel_size=processes * values.get("num_nodes", 1))
    if isinstance(values["val_check_interval"], int) and values["max_steps"] is not None:
        batches = values["max_steps"] * values["accumulate_grad_batches"]
        values["val_check_interval"] = min(values["val_check_interval"], batches)
    if values["precision"] == "auto":
        values["precision"] = "bf16-mixed" if on_gpu(values) else "32-true"
    try:
        return L.Trainer(
            **values,
            max_epochs=-1,
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
        )
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from None


def on_gpu(values: Mapping[str, Any]) -> bool:
    """Tell whether the `trainer` group trains on a GPU here."""
    import torch

    return torch.cuda.is_available() and values["accelerator"] in ("auto", "gpu", "cuda")


@contextlib.contextmanager
def fast_steps(values: Mapping[str, Any]) -> Iterator[None]:
    """Make training steps inside the `with` block fast: coarse products where `precision` allows, memory that is kept.

    Precision "auto" on a CPU with units for bfloat16 matrices rounds the factors of matrix products to it; weights,
    sums and all else stay float32. "32-true" does not.
    """
    from genossm.ops.precision import products, rounds_fast

    coarse = "highest"
    if on_gpu(values):
        coarse = "high"
    elif values["precision"] == "auto" and rounds_fast():
        coarse = "medium"
    _keep_memory()
    with products(coarse):
        yield


def _keep_memory() -> None:
    """Have the C library keep freed memory: fresh pages for every tensor take a tenth of a CPU's training step."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        library = ctypes.CDLL(None)
        library.mallopt(m_mmap_threshold, 1 << 30)
        library.mallopt(m_trim_threshold, (1 << 31) - 1)


def build_loggers(config: DictConfig, folder: Path) -> list[Any]:
    """Return the loggers that the `logger` group adds to metrics.csv."""
    from hydra.utils import instantiate

    loggers = [instantiate(value, save_dir=str(folder), _convert_="all") for value in config.logger.values()]
    try:
        # They begin now, where a mistake costs nothing, and not in the middle of what Lightning sets up.
        for made in loggers:
            _ = made.experiment
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        raise ValueError(
            f"Weights & Biases refused to begin: {str(error).splitlines()[0]} Or set logger.wandb.offline=true."
        ) from None
    return loggers


def close_loggers(trainer: Any) -> None:
    """End what a tracker holds open: else the next run of a sweep would go on in the same one."""
    for used in trainer.loggers:
        finish = getattr(getattr(used, "experiment", None), "finish", None)
        if callable(finish):
            finish()


def step_of(path: Path) -> int:
    """Return the step at which a checkpoint was written."""
    import torch

    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def report(task: Any, data: Any, metrics: Mapping[str, float], table: Any, folder: Path) -> None:
    """Print the closing table beside the context models and draw loss.png."""
    from rich.console import Console
    from rich.table import Table

    from genossm.data.markov import MarkovModel, thinned
    from genossm.plot import plot_loss

    causal = task.objective_name == "causal"
    orders = [(k, 0) for k in range(9)] if causal else [(k, k) for k in range(5)]
    splits = [split for split in ("val", "test") if data.splits[split]]
    shown = Table(
        title="bits per base on held-out intervals" if causal else "bits per masked base on held-out intervals"
    )
    shown.add_column("model")
    for split in splits:
        shown.add_column(split, justify="right")
    baselines: dict[str, float] = {}
    counted = {split: thinned(data.splits[split]) for split in ("train", *splits)}
    for left, right in orders:
        markov = MarkovModel(left, right).fit(data.genome, counted["train"])
        bits = {split: markov.bits(data.genome, counted[split]) for split in splits}
        name = f"Markov order {left}" if causal else f"{left} bases on each side"
        baselines[name] = bits["val"]
        shown.add_row(name, *(f"{bits[split]:.3f}" for split in splits))
    kind = f"{task.model.config.model_type}, {task.model.num_parameters():,} parameters"
    shown.add_row(f"[bold]{kind}", *(f"[bold]{metrics[f'{split}/bits']:.3f}" for split in splits))
    shown.add_row("its accuracy", *(f"{metrics[f'{split}/accuracy']:.3f}" for split in splits))
    console = Console(width=max(72, min(120, shutil.get_terminal_size().columns)))
    console.print(shown)
    if counted["train"] is not data.splits["train"]:
        bases, whole_bases = (sum(map(len, rows)) for rows in (counted["train"], data.splits["train"]))
        console.print(f"counted on {bases:,} of {whole_bases:,} training bases, evenly spread", highlight=False)
    plot_loss(table.rows, baselines, folder / "loss.png")
    console.print(f"{metrics['seconds']:.0f} s; {folder}", highlight=False)


def compose(overrides: list[str]) -> DictConfig:
    """Return the checked config of `genossm train OVERRIDES`, e.g. `compose(["experiment=hyenadna", "seed=1"])`."""
    return compose_verb("train", overrides)


def main() -> None:
    """Run `train` on the overrides of the command line."""
    launch("train", train, lambda result: result.metrics.get("val/bits", math.nan))
