"""What every task of the shelf promises. A new one is found by its file and asked the same."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch

import genossm.tasks
from genossm.data.datamodule import GenomeWindows
from genossm.data.examples import Target
from genossm.models.classifier import Classifier
from genossm.models.cnn import CNNConfig
from genossm.nn.head import HeadConfig
from genossm.optim import Optim
from genossm.tasks.base import LanguageModel, Task

# Tasks log through a trainer; here they run without one.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

STEPS = 60
OPTIM = Optim(lr=1e-2, weight_decay=0.0, schedule="constant", warmup=0)


def tasks() -> dict[str, type[Task]]:
    modules = [importlib.import_module(f"genossm.tasks.{m.name}") for m in pkgutil.iter_modules(genossm.tasks.__path__)]
    kinds = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {k.__name__: k for k in kinds if issubclass(k, Task) and k is not Task and not inspect.isabstract(k)}


TARGETS = {
    "binary": Target(kind="binary", names=("no", "yes")),
    "multiclass": Target(kind="multiclass", names=("a", "b", "c")),
    "multilabel": Target(kind="multilabel", names=("a", "b", "c")),
    "per_base": Target(kind="per_base", names=("out", "in")),
    "regression": Target(kind="regression", names=("x", "y")),
    "tracks": Target(kind="tracks", names=("x", "y")),
}


def cases() -> list[tuple[type[Task], str]]:
    return [(kind, target) for kind in tasks().values() for target in getattr(kind, "kinds", ("bases",))]


def draw_targets(kind: str, rows: int, length: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    outputs = len(TARGETS[kind].names)
    values = {
        "binary": lambda: rng.integers(outputs, size=rows),
        "multiclass": lambda: rng.integers(outputs, size=rows),
        "multilabel": lambda: rng.integers(2, size=(rows, outputs)).astype(np.float32),
        "per_base": lambda: rng.integers(outputs, size=(rows, length)).astype(np.uint8),
        "regression": lambda: rng.normal(size=(rows, outputs)).astype(np.float32),
        "tracks": lambda: rng.normal(size=(rows, length, outputs)).astype(np.float32),
    }
    return torch.from_numpy(values[kind]())


@pytest.fixture(params=cases(), ids=lambda case: f"{case[0].__name__}-{case[1]}")
def task_and_batch(request):
    kind, name = request.param
    torch.manual_seed(2)
    backbone = CNNConfig(d_model=32, n_layer=3, kernel_size=5, causal=False, embed_dropout=0.0).build()
    if issubclass(kind, LanguageModel):
        if kind.objective_name == "causal":
            backbone = CNNConfig(d_model=32, n_layer=3, kernel_size=5, embed_dropout=0.0).build()
        task = kind(backbone, OPTIM, STEPS)
        task.check_model(backbone)
        module = GenomeWindows(length=32, batch_size=4, objective=task.objective)
        module.setup()
        return task, next(iter(module.train_dataloader()))
    target = TARGETS[name]
    pooling = "none" if target.along else "mean"
    model = Classifier(backbone, HeadConfig(n_outputs=len(target.names), pooling=pooling))
    ids = torch.randint(7, 11, (4, 32), dtype=torch.uint8)
    return kind(model, OPTIM, STEPS, target), {"ids_BL": ids, "targets": draw_targets(name, 4, 32)}


def test_loss_is_a_finite_scalar_with_a_gradient(task_and_batch):
    task, batch = task_and_batch
    loss = task.training_step(batch, 0)
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in task.parameters())


def test_loss_falls_when_one_batch_is_learnt_by_heart(task_and_batch):
    task, batch = task_and_batch
    optimizer = OPTIM.build(task)
    losses = []
    for step in range(STEPS):
        loss = task.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_is_over_the_split_not_over_its_batches(task_and_batch):
    """Two unequal batches give the loss of both together, weighted by what they hold."""
    task, batch = task_and_batch
    task.eval()

    def measured(parts):
        said = {}
        task.log_dict = said.update
        for index, part in enumerate(parts):
            task.validation_step(part, index)
        task.on_validation_epoch_end()
        return float(said["val/loss"])

    def cut(rows):
        return {key: value[rows] for key, value in batch.items()}

    with torch.no_grad():
        assert measured([cut(slice(0, 1)), cut(slice(1, 4))]) == pytest.approx(measured([batch]), rel=1e-4)
