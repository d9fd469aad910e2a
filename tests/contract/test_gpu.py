"""Whole backbones on a GPU give what they give on the CPU, over sequences of many of the kernels' tiles."""

import pytest
import torch

from genossm.models.base import config_from_dict

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

# Steps are small, so that fresh weights remember what stands a thousand positions away.
STEPS = {"dt_min": 1e-3, "dt_max": 2e-3}
SHAPES = {
    "caduceus-ph": {"model_type": "caduceus", "d_model": 36, "n_layer": 2, **STEPS},
    "caduceus-ph, wide": {"model_type": "caduceus", "d_model": 128, "n_layer": 1, **STEPS},
    "caduceus-ps": {"model_type": "caduceus", "d_model": 32, "n_layer": 2, "rcps": True, **STEPS},
    "caduceus, untied": {"model_type": "caduceus", "d_model": 32, "n_layer": 1, "bidirectional_weight_tie": False}
    | STEPS,
    "mamba": {"model_type": "mamba", "d_model": 32, "n_layer": 2, **STEPS},
    "mamba2": {"model_type": "mamba2", "d_model": 64, "n_layer": 2, "headdim": 32, "d_state": 24, **STEPS},
    "hyenadna": {"model_type": "hyenadna", "d_model": 32, "n_layer": 2, "max_length": 20000, "embed_dropout": 0.0},
    "hyenadna, both ways": {"model_type": "hyenadna", "d_model": 32, "n_layer": 1, "max_length": 20000}
    | {"bidirectional": True, "embed_dropout": 0.0},
    "striped_hyena": {"model_type": "striped_hyena", "d_model": 32, "n_layer": 2, "n_head": 2, "vocab_size": 16},
    "transformer": {"model_type": "transformer", "d_model": 32, "n_layer": 2, "n_head": 2, "embed_dropout": 0.0},
}
LENGTHS = {"caduceus-ph, wide": 16384}


def pair(name):
    """Return the model on the CPU, the same on the GPU, and ids."""
    model = config_from_dict(SHAPES[name]).build()
    copy = config_from_dict(SHAPES[name]).build().cuda()
    copy.load_state_dict(model.state_dict())
    return model, copy, torch.randint(7, 11, (1, LENGTHS.get(name, 3001)))


def relative(got, truth):
    return float((got.detach().cpu().double() - truth.detach().double()).norm() / truth.detach().double().norm())


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_are_those_of_the_cpu(name):
    model, copy, ids_BL = pair(name)
    found = []
    for one, ids in ((model.train(), ids_BL), (copy.train(), ids_BL.cuda())):
        logits = one.logits(one(ids))
        torch.nn.functional.cross_entropy(logits[0], ids[0].roll(-1)).backward()
        found.append(logits)
    assert relative(found[1], found[0]) <= 1e-4
    truths = {key: weight.grad for key, weight in model.named_parameters()}
    largest = max(float(truth.norm()) for truth in truths.values())
    for key, weight in copy.named_parameters():
        error = float((weight.grad.cpu() - truths[key]).norm())
        assert error <= 1e-3 * max(float(truths[key].norm()), 1e-3 * largest), key


@pytest.mark.parametrize("name", SHAPES)
def test_inference_is_that_of_the_cpu(name):
    model, copy, ids_BL = pair(name)
    with torch.no_grad():
        assert relative(copy.eval().logits(copy(ids_BL.cuda())), model.eval().logits(model(ids_BL))) <= 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", SHAPES)
def test_far_bases_reach_as_on_the_cpu(name, training):
    """In fresh weights one base is but float32's noise a thousand positions away: 200 of them are exchanged."""
    model, copy, ids_BL = pair(name)
    other_BL = ids_BL.clone()
    middle = ids_BL.shape[1] // 2
    other_BL[0, middle - 100 : middle + 100] = 7
    places = [0, middle - 1100, middle + 1100, -1]
    moved = []
    for one, device in ((model.train(training), "cpu"), (copy.train(training), "cuda")):
        with torch.set_grad_enabled(training):
            ways = [one.logits(one(ids.to(device)))[0, places].detach().cpu().double() for ids in (ids_BL, other_BL)]
        moved.append(ways[1] - ways[0])
    truth, got = moved
    assert float(truth.norm()) > 2e-5, "the change does not reach that far even on the CPU"
    assert float((got - truth).norm()) <= 0.02 * float(truth.norm())
