import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from genossm.models.hyenadna import HyenaDNAConfig
from genossm.optim import Muon, Optim, orthogonalised


def tiny():
    return HyenaDNAConfig(d_model=16, n_layer=1, max_length=32).build()


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_orthogonalised_keeps_directions_and_levels_sizes(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
    got = torch.linalg.multi_dot([u.T, orthogonalised(matrix[None])[0], vt.T])
    levelled = got.diagonal()
    torch.testing.assert_close(got, torch.diag(levelled), atol=1e-6, rtol=0)
    assert sizes.max() / sizes.min() > 1.5
    assert levelled.min() > 0.6
    assert levelled.max() < 1.3


def test_muon_takes_the_matrices_of_blocks_alone():
    model = tiny()
    groups = Optim(optimizer="muon", matrix_lr=0.5).build(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for g in groups if g.get("orthogonal") for p in g["params"]}
    layers = ("mixer.in_proj", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    assert taken == {f"layers.0.{layer}.weight" for layer in layers}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_moves_and_the_state_can_be_restored(optimizer):
    def run(model, optim, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            ids = torch.randint(7, 11, (2, 20), generator=generator)
            model.logits(model(ids)).square().mean().backward()
            optim.step()
            optim.zero_grad()

    torch.manual_seed(1)
    first = tiny().eval()
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    optim = Optim(optimizer=optimizer, lr=1e-3).build(first)
    run(first, optim, 2, seed=0)
    assert not [name for name, p in first.named_parameters() if torch.equal(p, before[name])]

    second = tiny().eval()
    second.load_state_dict(first.state_dict())
    other = Optim(optimizer=optimizer, lr=1e-3).build(second)
    other.load_state_dict(copy.deepcopy(optim.state_dict()))
    run(first, optim, 2, seed=5)
    run(second, other, 2, seed=5)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_a_gpu_saved_steps_on_a_cpu_as_a_cpu_does():
    first, second = (Optim().build(nn.Linear(2, 2)) for _ in range(2))
    saved = first.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = True
    second.load_state_dict(saved)
    assert not any(group["fused"] for group in second.param_groups)


def test_muon_falls_faster_than_it_decays():
    layer = nn.Linear(8, 8, bias=False)
    target = torch.randn(8, 8)
    optim = Muon([{"params": [layer.weight], "orthogonal": True, "lr": 0.05}], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (layer.weight - target).square().sum()
        losses.append(loss.item())
        loss.backward()
        optim.step()
        optim.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="adamw, muon"):
        Optim(optimizer="sgd")


def test_warmup_then_cosine_ends_at_the_least_rate():
    optim = Optim(warmup=10, min_lr_ratio=0.1)
    factors = [optim.factor(step, 100) for step in range(101)]
    assert factors[:11] == pytest.approx([(s + 1) / 11 for s in range(10)] + [1.0])
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))
