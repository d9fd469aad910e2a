import pytest

from genossm import checkpoint
from genossm.train import compose, train

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
    given = ["+logger.tensorboard.name=tb", "logger.wandb.offline=true"]
    both = "logger=[tensorboard,wandb]"
    config = compose([*TINY, "trainer.max_steps=1", f"output={tmp_path}", both, given[1], "logger.tensorboard.name=tb"])
    folder = train(config).folder
    assert list(folder.glob("tb/events.out.tfevents.*"))
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert (folder / "metrics.csv").exists()
