"""Published HyenaDNA beyond the fixtures, held to a plain restatement of the published inference code."""

import re

import pytest
import torch

from genossm import published
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.nn.head import HeadConfig
from layouts.restated import below, hyenadna
from layouts.written import InMemory, close, ids_of, written

SMALL = {"d_model": 16, "n_layer": 2, "max_length": 40, "filter_order": 8}
VARIANTS = {
    "order 3": {"order": 3},
    "order 4, deep filter": {"order": 4, "num_inner_mlps": 4, "n_layer": 1},
    "no window": {"modulate": False},
    "window without a floor": {"shift": 0.0, "emb_dim": 3},
    "constant frequency": {"train_freq": False, "frequency": 3.0, "emb_dim": 9},
    "one layer in the filter": {"num_inner_mlps": 0, "frequency": 1.0},
    "epsilon, widths": {"layer_norm_eps": 1e-3, "d_inner": 24, "filter_order": 5, "vocab_size": 13},
    "no padding of the vocabulary": {"pad_vocab_size_multiple": 1},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_numbers_are_those_of_the_published_form(options):
    config, tensors, imported = written(HyenaDNAConfig(**{**SMALL, **options}), "hyenadna")
    W = below(tensors, "model.backbone.")
    for ids in (ids_of(13), ids_of(40), ids_of(1)):
        truth = hyenadna(W, config, ids[0])
        states = imported.backbone(ids)
        close(states[0], truth)
        close(imported.backbone.logits(states)[0], truth @ W["embeddings.word_embeddings.weight"].T)


@pytest.mark.parametrize("options", [{"tie_embeddings": False, "final_norm_eps": 1e-2}, {"num_inner_mlps": 3}])
def test_the_numbers_of_the_other_layout_are_the_same_but_for_one_epsilon(options):
    config, tensors, imported = written(HyenaDNAConfig(**SMALL, **options, frequency=2.0), "hyenadna-hf")
    layer = {"w": 2.0, "num_inner_mlps": options.get("num_inner_mlps", 2)}
    W = below(tensors, "hyena.backbone.")
    last = {name: W.pop(name) for name in ("ln_f.weight", "ln_f.bias")}
    ids = ids_of(17)
    # Without the last norm's weights, its input comes back as a sum of blocks: normalise it with its own epsilon.
    plain = {**W, "ln_f.weight": torch.ones(16).double(), "ln_f.bias": torch.zeros(16).double()}
    eps = config["layer_norm_epsilon"]
    if eps == 1e-5:
        truth = hyenadna({**W, **last}, {**config, "layer": layer, "layer_norm_epsilon": 1e-5}, ids[0])
        close(imported.backbone(ids)[0], truth)
        return
    stream = imported.backbone.run_layers(imported.backbone.embed(ids))[0].double()
    normed = torch.nn.functional.layer_norm(stream, (16,), eps=1e-5)
    close(normed, hyenadna(plain, {**config, "layer": layer, "layer_norm_epsilon": 1e-5}, ids[0]))
    truth = torch.nn.functional.layer_norm(stream, (16,), last["ln_f.weight"], last["ln_f.bias"], eps)
    close(imported.backbone(ids)[0], truth)


@pytest.mark.parametrize("name", ["head", "decoder.0"])
@pytest.mark.parametrize("mode", ["pool", "last", "first", "sum"])
def test_heads_pool_as_the_published_decoder_does(name, mode):
    head = HeadConfig(n_outputs=3)
    config, tensors, _ = written(HyenaDNAConfig(**SMALL), "hyenadna", head)
    tensors = {n.replace("head.output", f"{name}.output"): t for n, t in tensors.items()}
    decoder = {"_name_": "sequence", "mode": mode, "l_output": 0, "use_lengths": False}
    imported = published.read(InMemory({**config, "decoder": decoder}, tensors))
    ids = ids_of(21)
    x = hyenadna(below(tensors, "model.backbone."), config, ids[0])
    x = {"pool": x.mean(0), "last": x[-1], "first": x[0], "sum": x.sum(0)}[mode]
    W = below(tensors, f"{name}.output_transform.")
    close(imported.classifier(ids)[0], x @ W["weight"].T + W["bias"])
    again, _ = published.write(imported.classifier, "hyenadna")
    assert again["decoder"]["mode"] == mode


@pytest.mark.parametrize(("mode", "l_output"), [("pool", 3), ("last", 2), ("first", 2), ("sum", 4), ("ragged", None)])
def test_heads_answer_several_positions_as_the_published_decoder_does(mode, l_output):
    config, tensors, _ = written(HyenaDNAConfig(**SMALL), "hyenadna", HeadConfig(n_outputs=3))
    decoder = {"_name_": "sequence", "mode": mode, "l_output": l_output, "use_lengths": False}
    imported = published.read(InMemory({**config, "decoder": decoder}, tensors))
    ids = ids_of(21)
    x = hyenadna(below(tensors, "model.backbone."), config, ids[0])
    upto = torch.arange(1, 22).double()[:, None]
    x = {"pool": x.cumsum(0) / upto, "sum": x.cumsum(0)}.get(mode, x)
    x = x[:l_output] if mode in ("first", "ragged") else x[-l_output:]
    W = below(tensors, "head.output_transform.")
    close(imported.classifier(ids)[0], x @ W["weight"].T + W["bias"])
    assert published.write(imported.classifier, "hyenadna")[0]["decoder"] == decoder


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"mode": "max"}, "mode='max'"),
        ({"mode": "ragged", "use_lengths": True}, "use_lengths=True"),
        ({"mode": "ragged", "l_output": 0}, "l_output must be a whole number of at least 1"),
        ({"l_output": "all"}, "l_output must be"),
        ({"_name_": "retrieval"}, "_name_='retrieval'"),
        ({"surprise": 1}, "unknown keys: surprise"),
    ],
)
def test_a_head_that_is_not_the_published_one_is_refused(decoder, message):
    config, tensors, _ = written(HyenaDNAConfig(**SMALL, vocab_size=12), "hyenadna", HeadConfig(n_outputs=3))
    with pytest.raises(ValueError, match=message):
        published.read(InMemory({**config, "decoder": decoder}, tensors))


def test_recomputed_modules_have_another_name_for_the_same_tensors():
    config, tensors, imported = written(HyenaDNAConfig(**SMALL), "hyenadna")
    renamed = {re.sub(r"\.(mixer|mlp)\.", r".\1.layer.", name): t for name, t in tensors.items()}
    again = published.read(InMemory({**config, "checkpoint_mixer": True, "checkpoint_mlp": True}, renamed))
    assert torch.equal(again.backbone(ids_of()), imported.backbone(ids_of()))
    assert list(published.write(again.backbone, "hyenadna", again.origin)[1]) == list(renamed)


def test_positions_that_are_trained_are_parameters():
    _, _, imported = written(HyenaDNAConfig(**SMALL), "hyenadna")
    # The tables were drawn here, so they are held; regenerated ones are held where the config trains them.
    assert imported.backbone.config.own_positions
    fresh, plain = published.write(HyenaDNAConfig(**SMALL).build(), "hyenadna")
    assert not published.read(InMemory(fresh, plain)).backbone.config.own_positions
    trained = {**fresh, "layer": {**fresh["layer"], "lr_pos_emb": 1e-5}}
    backbone = published.read(InMemory(trained, plain)).backbone
    assert "layers.0.mixer.filter_fn.z_LE" in dict(backbone.named_parameters())


def test_a_long_table_that_differs_late_is_held():
    shape = HyenaDNAConfig(**{**SMALL, "max_length": 5000})
    config, tensors = published.write(shape.build(), "hyenadna-hf")
    name = "hyena.backbone.layers.1.mixer.filter_fn.pos_emb.z"
    changed = tensors[name].clone()
    changed[:, 3000:] += 0.1
    imported = published.read(InMemory(config, {**tensors, name: changed}))
    assert imported.backbone.config.own_positions
    assert torch.equal(published.write(imported.backbone, "hyenadna-hf", imported.origin)[1][name], changed)


def test_a_constant_frequency_that_is_in_the_file_is_refused():
    config, tensors = published.write(HyenaDNAConfig(**SMALL).build(), "hyenadna-hf")
    with pytest.raises(ValueError, match=r"implicit_filter.1.freq is unknown: the config says"):
        published.read(InMemory({**config, "train_freq": False}, tensors))
