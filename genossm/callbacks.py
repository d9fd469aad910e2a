"""What happens around training steps: checkpoints, the metrics table, progress, the stop at a NaN loss."""

import csv
import errno
import logging
import math
import os
import pickle
import signal
import threading
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

_SECONDS_BETWEEN_WRITES = 5.0
_WIDE = 120
"""Columns of a terminal from which the progress bar has room for everything."""


class Checkpointing(Callback):
    """Saves `last.ckpt` (and the one before it as `previous.ckpt`) every so many steps, and `best.ckpt` by a metric.

    Files are written under another name and renamed when they are whole. What the run draws at random outside the
    numbered batches (dropout) is saved with them, so that a resumed run repeats an uninterrupted one bit by bit. Ctrl-C
    and SIGTERM end the run after the step that they meet, with a checkpoint of it; under several processes the last
    regular checkpoint is what stays.

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
        self.saved_step = self.seen_step = -1
        self.signal: int | None = None
        self.after_validation: bool | None = None
        self._handlers: dict[int, Any] = {}
        self._restored: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between the batches of one accumulated gradient there is nothing that a checkpoint could hold.
        whole, self.seen_step = trainer.global_step != self.seen_step, trainer.global_step
        every = trainer.val_check_batch
        if isinstance(every, int) and (batch_idx + 1) % every == 0:
            # A run that goes on from here would not validate again, so the validation comes first.
            self.after_validation = whole
        else:
            self._end_step(trainer, whole)

    def _end_step(self, trainer: L.Trainer, whole: bool) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps or self.signal is not None
        if whole and due and step != self.saved_step:
            self.save(trainer)
        if self.signal is not None:
            logger.warning("stopped after step %d; resume=auto goes on from step %d", step, max(0, self.saved_step))
            raise SystemExit(128 + self.signal)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; the one before becomes `previous.ckpt`.

        Raises:
            ValueError: a weight is no finite number; the checkpoint before stays.
            OSError: the disk is full; the checkpoint before stays.
        """
        refuse_non_finite(trainer)
        for table in trainer.loggers:
            if isinstance(table, MetricsTable):
                table.write_up_to(trainer)
        last, new = self.folder / "last.ckpt", self.folder / ".new.ckpt"
        self._write(trainer, new)
        if trainer.is_global_zero:
            if last.exists():
                last.replace(self.folder / "previous.ckpt")
            new.replace(last)
        trainer.strategy.barrier("checkpoint")
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.after_validation is not None:
            whole, self.after_validation = self.after_validation, None
            self._end_step(trainer, whole)
        if self.monitor is None or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and math.isfinite(value):
            self.best = value
            self._write(trainer, self.folder / "best.ckpt")

    def _write(self, trainer: L.Trainer, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.part")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with temporary.open("rb") as handle:
                    os.fsync(handle.fileno())
                temporary.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                errno.ENOSPC,
                f"The checkpoint of step {trainer.global_step} could not be written to {self.folder}:"
                f" {error.strerror}. The one before it is whole: free some space and start again with"
                " resume=auto.",
            ) from None
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the random generators and the best value so far."""
        state: dict[str, Any] = {"best": self.best, "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the generators' state until training starts, since setting up draws from them too."""
        self.best = state_dict["best"]
        self._restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = self.seen_step = trainer.global_step
        restored, self._restored = self._restored, None
        if restored is not None:
            # All processes are seeded alike, so the state of the first is that of each.
            torch.set_rng_state(restored["torch"])
            if torch.cuda.is_available() and "cuda" in restored:
                torch.cuda.set_rng_state(restored["cuda"])
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}

    def _asked(self, number: int, frame: Any) -> None:
        # The second time the signal does what it did before.
        self._give_back()
        self.signal = number

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_back()


_MEND_NAN = (
    "The last good checkpoint is kept. Lower optim.lr, lengthen optim.warmup or lower trainer.gradient_clip_val, then"
    " start again with resume=auto."
)


def refuse_non_finite(trainer: L.Trainer) -> None:
    """Refuse to save weights that a step has made useless.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    finite = [torch.isfinite(getattr(p, "_local_tensor", p)).all() for p in trainer.lightning_module.parameters()]
    if finite and not bool(torch.stack(finite).all()):
        raise ValueError(f"After step {trainer.global_step} a weight is no finite number. {_MEND_NAN}")


class StopAtNaN(Callback):
    """Stops the run when a loss is no finite number, before it can reach a checkpoint; names the batch.

    On a GPU the losses of `every` batches are looked at together, since each look waits for the device.
    """

    def __init__(self, every: int = 10):
        self.every = every
        self.losses: list[tuple[int, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        self.losses.append((batch_idx, loss.detach()))
        if loss.device.type == "cpu" or len(self.losses) >= self.every:
            self.look()

    def look(self) -> None:
        """Raise at the first loss since the last look that is no finite number.

        Raises:
            ValueError: there is one.
        """
        values = torch.stack([loss for _, loss in self.losses]).tolist()
        numbers = [number for number, _ in self.losses]
        self.losses.clear()
        for number, value in zip(numbers, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"The loss of batch {number} (counted from 0) is {value}. {_MEND_NAN}")


class WeightAverage(Callback):
    """Keeps an exponential moving average of the weights, with which the run is evaluated and ends.

    The average follows each step: average += (1 - d) (weights - average), with d = min(decay, (1 + s) / (10 + s)) at
    step s, so that the first weights are soon forgotten. Training goes on with the weights themselves; both are in
    every checkpoint.

    Args:
        decay: d of later steps, in (0, 1); 0.999 averages over about a thousand steps.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 < decay < 1:
            raise ValueError(f"callbacks.ema.decay must lie in (0, 1); got {decay}.")
        self.decay = decay
        self.steps = 0
        self.averages: list[torch.Tensor] = []
        self.running = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse the runs whose weights are not this average's to choose."""
        if any(isinstance(other, Checkpointing) and other.monitor is not None for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "callbacks=ema averages pretraining; fine-tuning keeps its best epoch. Drop one of the two."
            )
        if getattr(pl_module, "device_mesh", None) is not None:
            raise ValueError("callbacks=ema needs whole weights in every process; take trainer=ddp instead of fsdp.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        if not self.averages:
            self.averages = [weight.clone() for weight in weights]
        self.averages = [a.to(weight.device) for a, weight in zip(self.averages, weights, strict=True)]
        self.running, self.step = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(self.averages, [p.detach() for p in pl_module.parameters()], 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exchange(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exchange(pl_module)
        self.running = False

    def _exchange(self, module: L.LightningModule) -> None:
        if not self.running:
            return
        with torch.no_grad():
            for average, parameter in zip(self.averages, module.parameters(), strict=True):
                weight = parameter.clone()
                parameter.copy_(average)
                average.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of steps in them."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the averages of a checkpoint."""
        self.steps, self.averages = state_dict["steps"], state_dict["averages"]


class MetricsTable(Logger):
    """Writes metrics.csv, one row a logged step, whole lines only; a resumed run goes on in the same file.

    Rows of steps that are run again after a resume are dropped first, so that the file reads as if nothing had
    happened.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.written = 0.0
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
        # Lightning calls this at every logged step; the whole file is written at every checkpoint and now and then.
        if time.monotonic() - self.written > _SECONDS_BETWEEN_WRITES:
            self.write()

    @rank_zero_only
    def write_up_to(self, trainer: L.Trainer) -> None:
        """Write the table with the row of the step that has just ended, which Lightning logs only after the hooks."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            ended = {name: float(v) for name, v in trainer.logged_metrics.items() if name.startswith("train/")}
            self.log_metrics(ended, trainer.global_step - 1)
        self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the whole table."""
        self.written = time.monotonic()
        columns = ["step", *sorted({name for row in self.rows.values() for name in row})]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, columns)
                writer.writeheader()
                writer.writerows({"step": step, **row} for step, row in sorted(self.rows.items()))

        write_atomically(self.path, write)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.rows:
            self.write()


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
        # At 80 columns all that is asked for has its place; a wider terminal shows more.
        self.wide = self.console.width >= _WIDE
        self.bar = Bar(
            BarColumn(40 if self.wide else 8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            *([TimeElapsedColumn()] if self.wide else []),
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
        narrow = self.console.is_terminal and not self.wide
        held = "" if math.isnan(self.val) or narrow else f"  val {self.val:.3f}"
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
    """Return the newest checkpoint of a folder, or None where there is none; a damaged one is reported and passed over.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    damaged: list[str] = []
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s can't be read (%s); falling back to the one before it", path, str(error)[:80])
            damaged.append(name)
            continue
        return path
    if damaged:
        raise ValueError(f"No checkpoint in {folder} can be read ({', '.join(damaged)}); start without resume.")
    return None


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for left in (*folder.glob(".*.part"), *folder.glob(".new.ckpt")):
        left.unlink(missing_ok=True)
