"""Adapters reach every projection of every backbone, whichever way its fast path reads the weight."""

import pytest
import torch

from genossm import adapters
from genossm.models.base import config_from_dict
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig

pytest.importorskip("peft", reason="the extra peft is not installed")

SHAPES = {
    "hyenadna": {"d_model": 16, "n_layer": 1, "max_length": 32},
    "bidirectional hyenadna": {"d_model": 16, "n_layer": 1, "max_length": 32, "bidirectional": True},
    "caduceus": {"d_model": 16, "n_layer": 2, "d_state": 4},
    "equivariant caduceus": {"d_model": 16, "n_layer": 2, "d_state": 4, "rcps": True},
    "mamba": {"d_model": 16, "n_layer": 1, "d_state": 4},
    "mamba2": {"d_model": 16, "n_layer": 1, "d_state": 8, "headdim": 8},
    "striped_hyena": {"d_model": 16, "n_layer": 2, "n_head": 2, "attn_layer_idx": [1], "vocab_size": 12},
    "transformer": {"d_model": 16, "n_layer": 1, "n_head": 2},
    "nucleotide_transformer": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 12},
    "cnn": {"d_model": 16, "n_layer": 1, "kernel_size": 3, "dilation_cycle": 1},
}


def build(kind):
    torch.manual_seed(0)
    backbone = config_from_dict({"model_type": kind.rpartition(" ")[2], **SHAPES[kind]}).build()
    return Classifier(backbone, HeadConfig(n_outputs=3, strands=2 if backbone.equivariant else 1)).double().eval()


IDS_BL = torch.randint(7, 11, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SHAPES)
def test_every_adapter_gets_a_gradient_and_is_what_is_saved(kind, tmp_path):
    model = build(kind)
    before_BC = model(IDS_BL).detach()
    adapted = adapters.add_adapters(model, rank=2).double()
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    assert len(layers) == len(adapters.adaptable(build(kind), 2)) > 0
    torch.testing.assert_close(model(IDS_BL), before_BC)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    model(IDS_BL).square().sum().backward()
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            assert factor["default"].weight.grad.abs().max() > 0
        assert layer.base_layer.parametrizations.weight.original.grad is None
    measured_BC = model(IDS_BL).detach()
    assert not torch.allclose(measured_BC, before_BC)
    adapters.save_adapters(adapted, model.head.config, tmp_path)
    torch.testing.assert_close(adapters.merge(adapted)(IDS_BL), measured_BC)
    again = adapters.load_adapters(build(kind).backbone, tmp_path).double()
    torch.testing.assert_close(again(IDS_BL), measured_BC, atol=1e-6, rtol=1e-5)


def test_dropout_acts_while_training_alone():
    model = build("mamba")
    adapted = adapters.add_adapters(model, rank=2, dropout=0.5).double()
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    model.train()
    assert not torch.equal(model(IDS_BL), model(IDS_BL))
    model.eval()
    assert torch.equal(model(IDS_BL), model(IDS_BL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"rank": 64}, "no linear layer wider than lora.rank=64"),
        ({"dropout": 1.0}, "in \\[0, 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapters.add_adapters(build("mamba"), **options)
