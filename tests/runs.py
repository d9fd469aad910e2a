"""Runs trainings in processes that can be killed: each line of stdin is [[folder, override, …], …], run in turn.

One process imports everything and forks for each run, so that a killed run costs no second import. A run works in its
folder and adds what it says to stderr.txt there; one that names `processes=2` is forked twice with the variables that
torchrun sets; `limit=N` lets no file grow beyond N bytes. Answers each line with the runs' exit statuses.
"""

import contextlib
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback

import lightning as L
import torch

import genossm.callbacks
import genossm.data.datamodule
import genossm.train
from genossm.cli import main
from genossm.data.datamodule import bundled


class KillAt(L.Callback):
    """Sends its own process a signal before a batch, by default one that leaves no chance to clean up."""

    def __init__(self, batch: int, number: int = signal.SIGKILL, truncate: bool = False):
        self.batch, self.number, self.truncate = batch, number, truncate

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            (saver,) = (c for c in trainer.callbacks if isinstance(c, genossm.callbacks.Checkpointing))
            if self.truncate:
                os.truncate(saver.folder / "last.ckpt", 1000)
            os.kill(os.getpid(), self.number)


class FullDisk(L.Callback):
    """Lets no file grow beyond 4 kB from a batch on, as a full disk does."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


class PoisonAt(L.Callback):
    """Makes a weight NaN before a batch."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


def forked(overrides: list[str], environment: dict[str, str]) -> int:
    """Start a run in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    os.chdir(overrides.pop(0))
    os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    # What is said there is for nobody: the server's own line alone is read.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for override in overrides:
        if override.startswith("limit="):
            size = int(override.partition("=")[2])
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.argv = ["train.py", *(override for override in overrides if not override.startswith("limit="))]
    code = 1
    try:
        main(verb="train")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(overrides: list[str]) -> list[int]:
    """Run one training, in as many processes as it names, and return their exit statuses."""
    if "processes=2" not in overrides:
        ids = [forked([*overrides], {})]
    else:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        kept = [override for override in overrides if override != "processes=2"]
        ids = [forked([*kept], several | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ids]


def warm_up() -> None:
    """Train once, so that no fork has to import or load what a training takes."""
    shape = ["model.d_model=16", "model.n_layer=1", "length=64", "batch_size=2", "data.eval_windows=2"]
    genome = f"data.fasta={bundled('fa.gz').with_name('lambda_NC_001416.fa.gz')}"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = [*shape, genome, f"output={folder}", "trainer.accelerator=cpu", "trainer.max_steps=1"]
        genossm.train.train(genossm.train.compose(given))
    # Forks are first processes of runs of their own.
    os.environ.pop("GENOSSM_RUN_FOLDER")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        sys.stdout.write(json.dumps([run(overrides) for overrides in json.loads(line)]) + "\n")
        sys.stdout.flush()
