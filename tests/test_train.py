import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genossm import checkpoint
from genossm.train import build_loggers, compose, train

ROOT = Path(__file__).parent.parent
TINY = [
    "experiment=hyenadna",
    "model.d_model=16",
    "length=64",
    "batch_size=2",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "data.eval_windows=4",
    "trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return train(compose([*TINY, f"output={tmp_path_factory.mktemp('runs')}"]))


def test_run_leaves_what_it_promises(result):
    left = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*")}
    assert {
        "config.yaml",
        "metrics.csv",
        "loss.png",
        "checkpoints/last.ckpt",
        "model/config.json",
        "model/model.safetensors",
    } <= left


def test_saved_model_opens(result):
    assert checkpoint.load(result.folder / "model").config == result.model.config


def test_other_loggers_write_beside_the_table(tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = ["logger=[tensorboard,wandb]", "logger.wandb.offline=true", "logger.tensorboard.name=tb"]
    import wandb

    folder = train(compose([*TINY, *loggers, f"output={tmp_path}"])).folder
    assert wandb.run is None, "the next run of a sweep would go on in this one"
    assert list(folder.glob("tb/events.out.tfevents.*"))
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert (folder / "metrics.csv").exists()


def test_wandb_without_a_key_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    # It remembers what earlier runs of the process found in the environment.
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"No API key configured.* Or set logger\.wandb\.offline=true"):
        build_loggers(compose([*TINY, "logger=wandb"]), tmp_path)


@pytest.mark.parametrize(
    "override",
    ["trainer.max_steps=0", "trainer.val_check_interval=0", "trainer.gradient_clip_val=-1", "data.eval_windows=0"],
)
def test_a_number_that_means_nothing_is_refused(override, tmp_path):
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"{key} must be .*; got {value}\."):
        train(compose([*TINY, override, f"output={tmp_path}"]))


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "trainer=ddp"],
        pytest.param(["-m", "genossm.cli", "train", "trainer=ddp"], marks=pytest.mark.slow),
        pytest.param(["train.py", "trainer=fsdp"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_processes_start_from_one_command(command, tmp_path):
    command = [str(ROOT / word) if word == "train.py" else word for word in command]
    given = [*TINY, "trainer.devices=2", f"output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *command, *given], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (folder,) = (tmp_path / "hyenadna").iterdir()
    assert checkpoint.load(folder / "model").num_parameters() > 0
    assert ran.stdout.count("bits per base on held-out intervals") == 1, "one process tells the result"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # The compiler itself does what torch deprecates.
def test_a_compiled_model_learns_the_same(tmp_path):
    bits = [train(compose([*TINY, f"compile={c}", f"output={tmp_path}"])).metrics["val/bits"] for c in (False, True)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)
