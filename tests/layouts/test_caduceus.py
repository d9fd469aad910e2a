"""Published Caduceus beyond the fixtures, held to a plain restatement of the published code."""

import pytest
import torch

from genossm import published
from genossm.models.caduceus import CaduceusConfig
from genossm.nn.head import HeadConfig
from layouts.restated import below, caduceus, strand_logits
from layouts.written import InMemory, close, ids_of, written

SMALL = {"d_model": 16, "n_layer": 3, "d_state": 4}
VARIANTS = {
    "ps plain convention": {"rcps": True, "fused_add_norm": False},
    "ps plain convention, LayerNorm, untied": {
        **{"rcps": True, "fused_add_norm": False, "rms_norm": False},
        **{"bidirectional_weight_tie": False, "tie_embeddings": False},
    },
    "ps released convention, untied head": {
        "rcps": True,
        "tie_embeddings": False,
        "bidirectional_strategy": "ew_multiply",
    },
    "ps released convention, LayerNorm, biases": {"rcps": True, "rms_norm": False, "bias": True, "conv_bias": False},
    "ps one way": {"rcps": True, "bidirectional": False},
    "ps one way, plain convention": {"rcps": True, "bidirectional": False, "fused_add_norm": False, "n_layer": 2},
    "ph one way": {"bidirectional": False, "bias": True},
    "ph multiplied, untied": {"bidirectional_strategy": "ew_multiply", "bidirectional_weight_tie": False},
    "ph multiplied, tied with bias": {"bidirectional_strategy": "ew_multiply", "bias": True, "norm_epsilon": 1e-3},
    "ph untied head, rank, taps": {"tie_embeddings": False, "dt_rank": 3, "d_conv": 3, "expand": 3},
    "no padding of the vocabulary": {"pad_vocab_size_multiple": 1, "rcps": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_numbers_are_those_of_the_published_form(options):
    shape = CaduceusConfig(**{**SMALL, **options})
    config, tensors, imported = written(shape, "caduceus-ps" if shape.rcps else "caduceus-ph")
    ids = ids_of()
    W = below(tensors, "caduceus.backbone.")
    truth = caduceus(W, config, ids[0])
    states = imported.backbone(ids)
    close(states[0], truth)
    embedding = W["embeddings.word_embeddings." + ("embedding.weight" if shape.rcps else "weight")]
    head = below(tensors, "lm_head.")
    weight = head.get("lm_head.weight", head.get("weight", embedding))
    expected = strand_logits(truth, weight, head["complement_map"]) if shape.rcps else truth @ weight.T
    close(imported.backbone.logits(states)[0], expected)


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("rcps", [True, False])
def test_classifiers_pool_each_strand(rcps, pooling):
    shape = CaduceusConfig(**SMALL, rcps=rcps)
    head = HeadConfig(n_outputs=3, bias=False, strands=2 if rcps else 1)
    config, tensors, _ = written(shape, "caduceus-ps" if rcps else "caduceus-ph", head)
    imported = published.read(InMemory(config, tensors), pooling=pooling)
    x, score = caduceus(below(tensors, "caduceus.backbone."), config, ids_of()[0]), tensors["score.weight"].double()
    pool = {"mean": lambda v: v.mean(0), "max": lambda v: v.amax(0), "first": lambda v: v[0], "last": lambda v: v[-1]}
    if rcps:
        halves = x.chunk(2, -1)
        truth = (pool[pooling](halves[0]) @ score.T + pool[pooling](halves[1].flip(0, 1)) @ score.T) / 2
    else:
        truth = pool[pooling](x) @ score.T
    close(imported.classifier(ids_of())[0], truth)


def test_plantcaduceus_has_no_prefix_and_all_its_aliases():
    shape = CaduceusConfig(
        **SMALL, rcps=True, vocab_size=8, complement_map=(0, 1, 2, 6, 5, 4, 3, 7), tokenizer="plantcaduceus"
    )
    config, tensors, _ = written(shape, "caduceus-ps")
    bare = {name.removeprefix("caduceus."): t for name, t in tensors.items() if not name.startswith("lm_head.")}
    for name in [n for n in bare if ".mamba_fwd." in n and ("in_proj" in n or "out_proj" in n)]:
        bare[name.replace("mamba_fwd", "mamba_rev")] = bare[name].clone()
    config = {**config, "architectures": ["Caduceus"], "pad_token_id": -100, "residual_in_fp32": True}
    imported = published.read(InMemory(config, bare))
    ids = ids_of(low=0, high=8)
    close(imported.backbone(ids)[0], caduceus(below(bare, "backbone."), config, ids[0]))
    again = published.write(imported.backbone, "caduceus-ps", imported.origin)[1]
    assert list(again) == list(bare)
    assert imported.backbone.config.tokenizer == "plantcaduceus"


def test_the_complement_is_read_by_id_and_the_weights_are_believed(caplog):
    shape = CaduceusConfig(**SMALL, rcps=True)
    config, tensors, imported = written(shape, "caduceus-ps")
    by_text = dict(sorted(config["complement_map"].items()))
    assert list(by_text) != list(config["complement_map"])
    again = published.read(InMemory({**config, "complement_map": by_text}, tensors))
    assert torch.equal(again.backbone.complement_V, imported.backbone.complement_V)
    assert not caplog.records
    wrong = {str(i): i for i in range(16)}
    again = published.read(InMemory({**config, "complement_map": wrong}, tensors))
    assert torch.equal(again.backbone.complement_V, imported.backbone.complement_V)
    assert "complement_map" in caplog.text
