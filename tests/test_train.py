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
