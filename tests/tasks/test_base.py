"""Language modelling: its loss does not depend on how many logits exist at once."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import genossm.tasks.base as base
from genossm.models.transformer import TransformerConfig
from genossm.optim import Optim, clip_norm
from genossm.tasks.base import share_out
from genossm.tasks.causal_lm import CausalLM


def test_losses_in_pieces_are_those_of_the_whole(monkeypatch):
    task = CausalLM(TransformerConfig(d_model=8, n_layer=1, n_head=2).build().eval(), Optim(), steps=1)
    ids_BL = torch.randint(7, 11, (2, 9))
    batch = {"ids_BL": ids_BL, "targets": ids_BL.roll(-1, 1), "weights_BL": torch.rand(2, 9)}
    counted_BL = torch.rand(2, 9) < 0.8
    found = []
    for piece in (100, 4):
        monkeypatch.setattr(base, "_PIECE", piece)
        nats_M, guessed_M, weights_M = task.losses(batch, counted_BL)
        gradients = torch.autograd.grad((nats_M * weights_M).sum(), list(task.model.parameters()))
        found.append([nats_M, guessed_M, weights_M, *gradients])
    assert len(found[0][0]) == int(counted_BL.sum())
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


def test_no_target_is_no_row():
    task = CausalLM(TransformerConfig(d_model=8, n_layer=1, n_head=2).build().eval(), Optim(), steps=1)
    ids_BL = torch.randint(7, 11, (2, 9))
    nats_M, guessed_M, weights_M = task.losses(
        {"ids_BL": ids_BL, "targets": ids_BL}, torch.zeros(2, 9, dtype=torch.bool)
    )
    assert len(nats_M) == len(guessed_M) == len(weights_M) == 0


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("width", "own"), [(640, [0]), (16, [])])
def test_large_blocks_are_shared_out_by_themselves_and_small_ones_together(width, own, alone):
    from torch.distributed.fsdp import FSDPModule

    torch.manual_seed(0)
    model = TransformerConfig(d_model=width, n_layer=1, n_head=2).build().eval()
    ids_BL = torch.randint(7, 11, (1, 9))
    expected = model.logits(model(ids_BL)).detach()
    share_out(model)
    assert [i for i, block in enumerate(model.layers) if isinstance(block, FSDPModule)] == own
    assert isinstance(model, FSDPModule)
    torch.testing.assert_close(model.logits(model(ids_BL)).detach(), expected)


class Distributed(TorchDispatchMode):
    """Counts operations on whole tensors that are shared out: each costs the host as much as many plain ones."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any("DTensor" in kind.__name__ for kind in types)
        return func(*args, **(kwargs or {}))


def test_shared_weights_are_clipped_and_stepped_as_whole_ones_piece_by_piece(alone):
    ids_BL = torch.randint(7, 11, (1, 9))
    found, counts = [], []
    for shared in (False, True):
        torch.manual_seed(0)
        model = TransformerConfig(d_model=16, n_layer=1, n_head=2).build().eval()
        if shared:
            share_out(model)
        optimizer = Optim(lr=0.01).build(model)
        for _ in range(3):
            model.logits(model(ids_BL)).square().mean().backward()
            with Distributed() as counting:
                norm = clip_norm(model.parameters(), 0.05) if shared else clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
            optimizer.zero_grad()
            counts.append(counting.count)
        assert norm > 0.05
        found.append([norm, *(p.full_tensor() if shared else p for p in model.parameters())])
    # The first step makes the moments, and the norm is added up over the processes.
    assert max(counts[4:]) <= 1, counts
    for whole, gathered in zip(*found, strict=True):
        torch.testing.assert_close(gathered, whole)
