"""Recorded steps give the losses and gradients of steps that are not, whatever comes in whatever order."""

import logging

import pytest
import torch

from genossm.models.hyenadna import HyenaDNAConfig
from genossm.optim import Optim
from genossm.recording import MOST, Steps, record
from genossm.tasks.causal_lm import CausalLM
from genossm.train import compose, train

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def tape(run):
    """Record as a graph does, without a GPU: what does it again writes where the first results stand."""
    loss, grads = run()

    def again():
        new_loss, new_grads = run()
        loss.copy_(new_loss)
        for place, new in zip(grads, new_grads, strict=True):
            if place is not None:
                place.copy_(new)

    again()
    return again, (loss, grads)


def build(device="cpu", dropout=0.0):
    torch.manual_seed(0)
    config = HyenaDNAConfig(d_model=16, n_layer=2, max_length=64, tie_embeddings=False, embed_dropout=dropout)
    return CausalLM(config.build().to(device), Optim(), steps=1)


def draw(length, seed, device="cpu"):
    torch.manual_seed(seed)
    ids_BL = torch.randint(7, 11, (2, length), dtype=torch.uint8, device=device)
    targets_BL = ids_BL.roll(-1, 1)
    targets_BL[:, -1] = 255
    return {"ids_BL": ids_BL, "targets": targets_BL}


def given(task, steps, batches, add_up=1):
    """Return the losses and, for each step of the optimizer, the sum of the gradients."""
    losses, sums = [], []
    parameters = list(task.parameters())
    for number, batch in enumerate(batches):
        loss = task.training_loss(batch) if steps is None else steps.loss(batch)
        losses.append(loss.detach())
        if number % add_up == 0:
            task.zero_grad()
        if steps is None or not steps.backward():
            (loss / add_up).backward()
        # While the loss is there, so is all that led to it.
        del loss
        if (number + 1) % add_up == 0:
            sums.append([None if p.grad is None else p.grad.clone() for p in parameters])
    return losses, sums


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    for ones, others in zip(found[1], expected[1], strict=True):
        for one, other in zip(ones, others, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("add_up", [1, 2])
def test_losses_and_gradients_are_those_of_steps_that_are_not_recorded(add_up):
    task = build()
    batches = [draw(length, seed) for seed, length in enumerate((20, 20, 33, 20, 33, 33, 20, 20))]
    steps = Steps(task.training_loss, list(task.parameters()), add_up, tape)
    assert_same(given(task, steps, batches, add_up), given(task, None, batches, add_up))


def test_a_kind_of_batch_is_recorded_when_it_comes_again_and_only_so_many_are(caplog):
    task, recorded = build(), []
    steps = Steps(task.training_loss, list(task.parameters()), 1, lambda run: (recorded.append(0), tape(run))[1])
    with caplog.at_level(logging.INFO):
        for length in range(4, 4 + MOST + 3):
            given(task, steps, [draw(length, 0)])
    assert not recorded
    assert f"Steps of {MOST} kinds" in caplog.text
    given(task, steps, [draw(length, 1) for length in (4, 4 + MOST, 4, 4 + MOST)])
    assert len(recorded) == 1


def test_weights_that_are_frozen_or_moved_are_another_kind():
    task = build()
    steps = Steps(task.training_loss, list(task.parameters()), 1, tape)
    batches = [draw(20, seed) for seed in range(3)]
    given(task, steps, batches)
    task.model.layers[0].requires_grad_(False)
    task.model.norm_f.weight.data = 2 * task.model.norm_f.weight.data
    task.zero_grad()
    found = given(task, steps, batches)
    assert_same(found, given(task, None, batches))
    assert any(grad is None for grad in found[1][2])


def test_what_can_not_be_recorded_runs_as_it_is_and_says_why(caplog):
    def refuse(run):
        try:
            raise RuntimeError("operation not permitted\nmore of it")
        finally:
            raise RuntimeError("the recording had failed")

    task = build()
    batches = [draw(20, seed) for seed in range(4)]
    steps = Steps(task.training_loss, list(task.parameters()), 1, refuse)
    assert_same(given(task, steps, batches), given(task, None, batches))
    assert [record.message for record in caplog.records] == ["Steps are not recorded: operation not permitted"]


def test_a_run_on_the_cpu_says_that_it_records_nothing(tmp_path, caplog):
    tiny = [
        "trainer=cpu",
        "trainer.max_steps=2",
        "length=64",
        "batch_size=2",
        "data.eval_windows=2",
        "model.d_model=16",
    ]
    train(compose(["experiment=hyenadna", "record=true", f"output={tmp_path}", *tiny]))
    assert "Steps are not recorded: that takes a GPU, and the model is on cpu." in caplog.text


@gpu
@needs_gpu
@pytest.mark.parametrize("add_up", [1, 2])
def test_graphs_give_what_steps_that_are_not_recorded_give(add_up):
    task = build("cuda", dropout=0.1)
    batches = [draw(length, seed, "cuda") for seed, length in enumerate((20, 20, 33, 20, 33, 33, 20, 20))]
    steps = Steps(task.training_loss, list(task.parameters()), add_up, record)
    torch.cuda.manual_seed(3)
    found = given(task, steps, batches, add_up)
    assert sum(one is not None for one in steps._known.values()) == 2
    torch.cuda.manual_seed(3)
    assert_same(found, given(task, None, batches, add_up))


@gpu
@needs_gpu
def test_a_step_that_waits_for_the_gpu_goes_on_unrecorded(caplog):
    task = build("cuda", dropout=0.1)

    def waits(batch):
        loss = task.training_loss(batch)
        return loss * float(loss > 0)

    batches = [draw(20, seed, "cuda") for seed in range(4)]
    steps = Steps(waits, list(task.parameters()), 1, record)
    torch.cuda.manual_seed(3)
    found = given(task, steps, batches)
    assert "Steps are not recorded" in caplog.text
    torch.cuda.manual_seed(3)
    assert_same(found, given(task, None, batches))
