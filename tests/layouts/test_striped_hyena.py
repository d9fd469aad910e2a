"""Published StripedHyena beyond the fixture, held to a plain restatement of the published code."""

import pytest
import torch

from genossm import published
from genossm.models.striped_hyena import StripedHyenaConfig
from layouts.restated import below, striped_hyena
from layouts.written import InMemory, close, ids_of, written

SMALL = {"d_model": 16, "n_layer": 3, "n_head": 4, "d_state": 3, "vocab_size": 20, "pad_vocab_size_multiple": 1}
VARIANTS = {
    "gates by thirds": {"column_split": False},
    "grouped heads": {"n_kv_head": 2, "attn_layer_idx": (0, 2)},
    "one key for all heads": {"n_kv_head": 1, "qkv_bias": False, "out_bias": False},
    "scaled rotary": {"rotary_scaling": 16.0, "rotary_base": 5000.0},
    "silu, untied, no last norm": {"activation": "silu", "tie_embeddings": False, "final_norm": False},
    "identity, taps, no bias": {"activation": "identity", "short_filter_order": 4, "short_filter_bias": False},
    "all attention, wide network": {"attn_layer_idx": (0, 1, 2), "d_inner": 40},
    "all convolution, epsilon": {"attn_layer_idx": (), "norm_eps": 1e-2},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_numbers_are_those_of_the_published_form(options):
    config, tensors, imported = written(StripedHyenaConfig(**{**SMALL, **options}), "stripedhyena")
    ids = ids_of(low=0, high=20)
    truth = striped_hyena(below(tensors, "backbone."), config, ids[0])
    backbone = imported.backbone
    close(backbone.logits(backbone(ids))[0], truth)
    x, state = backbone.extend(ids[:, :5], backbone.init_state(1))
    rows = [x[0]]
    for column in ids[:, 5:].unbind(1):
        x, state = backbone.step(column, state)
        rows.append(x)
    close(backbone.logits(torch.cat(rows)), truth)


def test_the_original_code_has_no_prefix_and_no_model_type():
    config, tensors, imported = written(StripedHyenaConfig(**SMALL), "stripedhyena")
    bare = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    plain = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    again = published.read(InMemory(plain, bare))
    ids = ids_of(low=0, high=20)
    assert torch.equal(again.backbone(ids), imported.backbone(ids))


def test_the_width_of_the_network_follows_from_the_published_rule():
    config, tensors, _ = written(StripedHyenaConfig(**SMALL, d_inner=64), "stripedhyena")
    # 8/3 of 16 is 42, and the next multiple of 64 is 64.
    implied = {**config, "inner_mlp_size": None}
    assert published.read(InMemory(implied, tensors)).backbone.config.mlp_width == 64
    with pytest.raises(ValueError, match=r"l1.weight has shape \(64, 16\) instead of \(48, 16\)"):
        published.read(InMemory({**implied, "inner_size_multiple_of": 16}, tensors))


def test_frequencies_of_another_rotary_are_refused():
    config, tensors, _ = written(StripedHyenaConfig(**SMALL), "stripedhyena")
    name = "backbone.blocks.1.inner_mha_cls.rotary_emb.inv_freq"
    with pytest.raises(ValueError, match=f"{name} differs from what the config gives"):
        published.read(InMemory(config, {**tensors, name: tensors[name] * 2}))
