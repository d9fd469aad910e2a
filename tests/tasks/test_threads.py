import pytest
import torch

from genossm.models.hyenadna import HyenaDNAConfig
from genossm.optim import Optim
from genossm.tasks import threads
from genossm.tasks.causal_lm import CausalLM


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def task_of(**shape):
    torch.manual_seed(0)
    task = CausalLM(HyenaDNAConfig(d_model=16, n_layer=2, max_length=64, **shape).build(), Optim(), 10)
    task.log_dict = lambda *_, **__: None
    return task


def batch_of(rows, weights=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 12, (rows, 65), generator=generator, dtype=torch.uint8)
    targets = ids[:, 1:].clone()
    targets[targets == 11] = 255
    batch = {"ids_BL": ids[:, :-1], "targets": targets}
    if weights:
        batch["weights_BL"] = torch.rand(rows, 64, generator=generator)
    return batch


def step(task, batch):
    task.zero_grad()
    loss = task.training_step(batch, 0)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in task.parameters())]


@pytest.mark.parametrize("weights", [False, True])
def test_rows_on_threads_give_the_loss_and_gradients_of_one_thread(two_threads, weights):
    task, batch = task_of(), batch_of(3, weights)
    assert threads.parts_for(task.model, 3, torch.device("cpu")) == 2
    got, again = step(task, batch), step(task, batch)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert threads.parts_for(task.model, 3, torch.device("cpu")) == 1
    for one, side, repeated in zip(step(task, batch), got, again, strict=True):
        torch.testing.assert_close(side, one, atol=1e-6, rtol=1e-4)
        assert torch.equal(side, repeated)


def test_what_draws_or_keeps_threads_of_its_own_is_not_divided(two_threads):
    cpu = torch.device("cpu")
    assert threads.parts_for(task_of(residual_dropout=0.1).model, 4, cpu) == 1
    assert threads.parts_for(task_of().model, 1, cpu) == 1
    model = task_of().model
    model.gradient_checkpointing = True
    assert threads.parts_for(model, 4, cpu) == 1
    with torch.no_grad():
        assert threads.parts_for(task_of().model, 4, cpu) == 1


def test_an_error_in_a_part_is_raised_and_the_threads_are_given_back(two_threads):
    layer = torch.nn.Linear(2, 1)

    def fails():
        raise ValueError("this part")

    for parts in ([layer.weight.sum, fails], [fails, layer.weight.sum]):
        with pytest.raises(ValueError, match="this part"):
            threads.summed(parts, layer)
        assert torch.get_num_threads() == 2
