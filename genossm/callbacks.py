"""What happens around training steps: checkpoints, the metrics table, progress, the stop at a NaN loss."""

import csv
import errno
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from genossm.data.base import Batch
from genossm.files import write_atomically

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves `last.ckpt` (and the one before it as `previous.ckpt`) every so many steps, and `best.ckpt` by a metric.

    Files are written under another name and renamed when they are whole. What the run draws at random outside the
    numbered batches (dropout) is saved with them, so that a resumed run repeats an uninterrupted one bit by bit.

    Args:
        folder: where the files go.
        every: steps between two saves.
        monitor: validation metric whose smallest value marks `best.ckpt`, or None.
        mode: "min" or "max".
    """

    def __init__(self, folder: Path, every: int, monitor: str | None = None, mode: str = "min"):
        if every < 1:
            raise ValueError(f"save_every must be at least 1; got {every}.")
        self.folder, self.every, self.monitor, self.mode = folder, every, monitor, mode
        self.best: float | None = None
        self.saved_step = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        ended = step == trainer.max_steps
        if step != self.saved_step and step and (step % self.every == 0 or ended):
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; the one before becomes `previous.ckpt`."""
        self.saved_step = trainer.global_step
        last, previous = self.folder / "last.ckpt", self.folder / "previous.ckpt"
        new = self.folder / ".new.ckpt"
        self._write(trainer, new)
        if trainer.is_global_zero:
            if last.exists():
                last.replace(previous)
            new.replace(last)
        trainer.strategy.barrier("checkpoint")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and math.isfinite(value):
            self.best = value
            self._write(trainer, self.folder / "best.ckpt")

    def _write(self, trainer: L.Trainer, path: Path) -> None:
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if not trainer.is_global_zero:
            return
        try:
            write_atomically(path, lambda temporary: torch.save(state, temporary))
        except (OSError, RuntimeError) as error:
            full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full:
                raise
            raise OSError(
                errno.ENOSPC,
                f"{path} could not be written, the disk is full ({error}). The checkpoint before it is whole: free"
                " some space and start again with resume=auto.",
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the random generators and the best value so far."""
        state: dict[str, Any] = {"best": self.best, "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the generators' state until training starts, since setting up draws from them too."""
        self.best = state_dict["best"]
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restored = self.__dict__.pop("_restored", None)
        if restored is not None:
            torch.set_rng_state(restored["torch"])
            if torch.cuda.is_available() and "cuda" in restored:
                torch.cuda.set_rng_state_all(restored["cuda"])


class StopAtNaN(Callback):
    """Stops the run when a loss is no finite number, before it can reach a checkpoint; names the batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None and not bool(torch.isfinite(loss)):
            raise ValueError(
                f"The loss of batch {batch_idx} (step {trainer.global_step}) is {float(loss)}. The last good checkpoint"
                " is kept. Lower optim.lr, lengthen optim.warmup or lower trainer.gradient_clip_val, then resume=auto."
            )


class MetricsTable(Logger):
    """Writes metrics.csv, one row a logged step, whole lines only; a resumed run goes on in the same file.

    Rows of steps that are run again after a resume are dropped first, so that the file reads as if nothing had
    happened.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.columns: list[str] = ["step"]
        self.rows: dict[int, dict[str, float]] = {}
        if path.exists():
            with path.open(newline="") as handle:
                for row in csv.DictReader(handle):
                    self.rows[int(row["step"])] = {k: float(v) for k, v in row.items() if k != "step" and v}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def forget_from(self, step: int) -> None:
        """Drop the rows of `step` and later ones."""
        self.rows = {key: row for key, row in self.rows.items() if key < step}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(step or 0, {})
        row.update({name: float(value) for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the resolved config lies beside the table."""

    @rank_zero_only
    def save(self) -> None:
        columns = ["step", *sorted({name for row in self.rows.values() for name in row})]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, columns)
                writer.writeheader()
                writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))

        write_atomically(self.path, write)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class Progress(Callback):
    """A rich progress bar: loss, bits per base, tokens/s and the time left; plain lines where there is no terminal."""

    def __init__(self, steps: int):
        self.steps = steps
        self.tokens = 0
        self.bits = math.nan
        self.val = math.nan

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self.console = Console()
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=self.steps, completed=trainer.global_step, text="")
        self.bar.start()
        self.tokens, self.began, self.first = 0, time.monotonic(), trainer.global_step

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.tokens += batch["ids_BL"].numel() * trainer.world_size
        step = trainer.global_step
        every = max(1, self.steps // 20)
        if self.console.is_terminal or step % every == 0:
            loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
            self.bits = loss / math.log(2)
            self.show(step)
            if not self.console.is_terminal:
                left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.steps - step)
                self.console.print(f"step {step}/{self.steps}  {self._text()}  {left:.0f} s left", highlight=False)

    def show(self, step: int) -> None:
        """Redraw the bar."""
        self.bar.update(self.task, completed=step, text=self._text())

    def _text(self) -> str:
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        held = "" if math.isnan(self.val) else f"  val {self.val:.3f}"
        return f"loss {self.bits * math.log(2):.3f}  bits/base {self.bits:.3f}{held}  {rate:,.0f} tokens/s"

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.val = float(trainer.callback_metrics.get("val/bits", math.nan))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.stop()

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def last_good(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder that can be read; a damaged one is reported and passed over."""
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            logger.warning("%s can't be read (%s); falling back to the checkpoint before it", path, str(error)[:80])
            continue
        return path
    return None


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    (folder / ".new.ckpt").unlink(missing_ok=True)
