"""Supervised tasks: the loss falls when one batch is overfitted; both strands are averaged; rates follow depth."""

import numpy as np
import pytest
import torch

from genossm.data.examples import Example, Target
from genossm.data.sequences import Encoded, SequenceBatches
from genossm.dna import alphabet
from genossm.dna.tokenizer import CharTokenizer
from genossm.models.base import config_from_dict
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.optim import Optim
from genossm.tasks.classification import Classification, balanced_weights
from genossm.tasks.regression import Regression
from genossm.tasks.supervised import other_strand

TARGETS = {
    "binary": Target(kind="binary", names=("a", "b")),
    "multiclass": Target(kind="multiclass", names=("a", "b", "c")),
    "multilabel": Target(kind="multilabel", names=("a", "b")),
    "per_base": Target(kind="per_base", names=("a", "b")),
    "regression": Target(kind="regression", names=("y",)),
    "tracks": Target(kind="tracks", names=("u", "v"), bin=4),
}


def example(kind, i):
    rng = np.random.default_rng(i)
    length = 4 * int(rng.integers(4, 8))
    target = {
        "binary": i % 2,
        "multiclass": i % 3,
        "multilabel": (float(i % 2), float(i % 3 == 0)),
        "per_base": rng.integers(2, size=length).astype(np.uint8),
        "regression": (10.0 + 3 * i,),
        "tracks": rng.normal(size=(length // 4, 2)).astype(np.float32),
    }[kind]
    return Example("".join(rng.choice(list("ACGT"), size=length)), target)


def make(kind, **options):
    target = TARGETS[kind]
    torch.manual_seed(0)
    values = {"model_type": "hyenadna", "d_model": 16, "n_layer": 2, "max_length": 32, "embed_dropout": 0.0}
    head = HeadConfig(n_outputs=len(target.names), pooling="none" if target.along else "mean", bin=target.bin)
    model = Classifier(config_from_dict(values).build(), head)
    task = Regression if kind in Regression.kinds else Classification
    return task(model, Optim(lr=3e-3, schedule="constant", warmup=0), 60, target, **options)


def batch_of(kind, rows=6):
    return SequenceBatches(Encoded([example(kind, i) for i in range(rows)], TARGETS[kind]), CharTokenizer(), 6, None)[0]


@pytest.mark.parametrize("kind", TARGETS)
def test_loss_is_finite_and_falls(kind):
    task = make(kind, **({"mean": [17.0], "scale": [5.0]} if kind == "regression" else {}))
    task.log = lambda *_: None
    batch = batch_of(kind)
    optimizer = task.configure_optimizers()["optimizer"]
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = task.training_step(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


def test_fold_leaves_the_answers_as_they_were():
    task = make("regression", mean=[17.0], scale=[5.0]).eval()
    batch = batch_of("regression")
    before = task.answer(batch, both=False)
    task.fold()
    torch.testing.assert_close(task.answer(batch, both=False), before)
    torch.testing.assert_close(task.model(batch["ids_BL"], batch["lengths_B"]), before)


@pytest.mark.parametrize("kind", ["binary", "per_base", "tracks"])
def test_conjoined_answers_turn_with_the_sequence(kind):
    task = make(kind, conjoin="always").eval()
    batch = batch_of(kind)
    flipped = {**batch, "ids_BL": other_strand(batch["ids_BL"], batch["lengths_B"])}
    ours, theirs = task.answer(batch, both=True), task.answer(flipped, both=True)
    if not task.target.along:
        torch.testing.assert_close(theirs, ours)
        return
    for row, length in enumerate((batch["lengths_B"] // task.target.bin).tolist()):
        torch.testing.assert_close(theirs[row, :length].flip(0), ours[row, :length])


def test_other_strand_keeps_padding_right():
    codes = alphabet.from_text("AACGT")
    ids = torch.from_numpy(np.concatenate([codes, np.full(3, alphabet.PAD, np.uint8)]))[None]
    turned = other_strand(ids, torch.tensor([5]))
    assert CharTokenizer().decode(turned[0, :5].tolist()) == "ACGTT"
    assert turned[0, 5:].tolist() == [alphabet.PAD] * 3


def test_layer_decay_gives_deeper_layers_smaller_rates():
    task = make("binary", layer_decay=0.5)
    rates = {p: g["lr"] for g in task.configure_optimizers()["optimizer"].param_groups for p in g["params"]}
    base = task.optim.lr
    model = task.model
    assert rates[model.head.out.weight] == rates[model.backbone.norm_f.weight] == base
    assert rates[next(model.backbone.layers[1].parameters())] == base * 0.5
    assert rates[next(model.backbone.layers[0].parameters())] == base * 0.25
    assert rates[model.backbone.embedding.weight] == base * 0.125
    assert len(rates) == sum(p.requires_grad for p in task.parameters())


def test_frozen_backbone_stays_in_evaluation_mode():
    task = make("binary")
    task.model.backbone.requires_grad_(False)
    task.train()
    assert not task.model.backbone.training
    assert task.model.head.training


def test_class_weights():
    assert balanced_weights([0, 0, 0, 1], 2) == pytest.approx([2 / 3, 2.0])
    with pytest.raises(ValueError, match="positive weight for each of a, b"):
        make("binary", class_weights=[1.0])
    with pytest.raises(ValueError, match="trains on regression, tracks"):
        Regression(make("binary").model, Optim(), 1, TARGETS["binary"])
    with pytest.raises(ValueError, match="conjoin must be one of"):
        make("binary", conjoin="both")


def test_weights_that_are_shared_out_are_refused():
    task = make("binary")
    task._device_mesh = object()
    with pytest.raises(ValueError, match="take trainer=ddp"):
        task.configure_model()
