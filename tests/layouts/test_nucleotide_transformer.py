"""Nucleotide Transformer and ESM-2 beyond the fixtures: transformers' own classes, and a plain restatement."""

import pytest
import torch

from genossm import published, source
from genossm.models.base import lengths_of
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.nn.head import HeadConfig
from layouts.restated import below, esm_v2
from layouts.written import InMemory, close, ids_of, written

SHAPE = {
    **{"vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    **{"pad_token_id": 1, "mask_token_id": 32, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0},
    "attention_probs_dropout_prob": 0.0,
}
OPTIONS = {
    "ESM-2": {"position_embedding_type": "rotary", "token_dropout": True},
    "ESM-1b": {"position_embedding_type": "absolute", "token_dropout": True, "emb_layer_norm_before": True},
    "NT v1": {"position_embedding_type": "absolute", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
    "rotary, norm before": {"position_embedding_type": "rotary", "emb_layer_norm_before": True, "rope_theta": 500.0},
}


def official(folder, kind, **options):
    """Return transformers' model of a random tiny shape, every weight drawn, and what it saves: config and tensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EsmConfig(**{**SHAPE, **options})
    config.architectures = [f"EsmFor{kind}"]
    model = getattr(transformers, f"EsmFor{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    files = source.find(folder)
    return model, files.read_config(), files.read_tensors()


def batch():
    """Return ids with masked tokens and padding, and their mask."""
    ids = ids_of(19, 4, 31, rows=3)
    ids[:, 3], ids[0, 7] = 32, 32
    mask = torch.ones_like(ids)
    ids[1, 12:], mask[1, 12:] = 1, 0
    ids[2, 5:], mask[2, 5:] = 1, 0
    return ids, mask


def compare_gradients(model, ours, backbone, head=None):
    layout = published.layouts()["esm"]
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in ours.named_parameters():
        short = name.removeprefix("backbone.")
        published_name = layout.full(layout.theirs(short, backbone.config), head)
        if parameter.grad is None:
            assert published_name not in theirs or not theirs[published_name].any(), published_name
            continue
        if not published_name.endswith(("self.key.bias", "decoder.bias")):
            # The bias of a key has no gradient but rounding: softmax doesn't see it.
            torch.testing.assert_close(
                parameter.grad.norm(), theirs[published_name].norm(), atol=1e-6, rtol=1e-3, msg=published_name
            )
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_language_models_are_those_of_transformers(options, tmp_path):
    model, config, tensors = official(tmp_path, "MaskedLM", **options)
    imported = published.read(InMemory(config, tensors))
    again = published.write(imported.backbone, "esm", imported.origin)[1]
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    ids, mask = batch()
    backbone, real = imported.backbone, mask.bool()
    logits = backbone.logits(backbone(ids, lengths_of(mask)))
    truth = model(ids, attention_mask=mask, labels=ids.masked_fill(~real, -100))
    torch.testing.assert_close(logits[real], truth.logits[real], atol=2e-5, rtol=1e-4)
    bare = backbone.logits(backbone(ids))
    torch.testing.assert_close(bare, model(ids).logits, atol=2e-5, rtol=1e-4)
    truth.loss.backward()
    torch.nn.functional.cross_entropy(logits[real], ids[real]).backward()
    compare_gradients(model, backbone, backbone)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("options", [OPTIONS["ESM-2"], OPTIONS["NT v1"]], ids=["ESM-2", "NT v1"])
def test_classifiers_are_those_of_transformers(kind, options, tmp_path):
    names = {0: "promoter", 1: "enhancer", 2: "neither"}
    model, config, tensors = official(
        tmp_path, kind, **options, id2label=names, label2id={v: k for k, v in names.items()}
    )
    imported = published.read(InMemory(config, tensors))
    assert imported.classifier.head.config.names == tuple(names.values())
    ids, mask = batch()
    got, truth = imported.classifier(ids, lengths_of(mask)), model(ids, attention_mask=mask).logits
    if kind.startswith("Token"):
        got, truth = got[mask.bool()], truth[mask.bool()]
    torch.testing.assert_close(got, truth, atol=2e-5, rtol=1e-4)
    truth.square().sum().backward()
    got.square().sum().backward()
    compare_gradients(model, imported.classifier, imported.backbone, imported.classifier.head.config)
    fresh = published.write(imported.classifier, "esm")
    assert published.read(InMemory(*fresh)).classifier.head.config == imported.classifier.head.config


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "head", [None, HeadConfig(n_outputs=3, pooling="first", hidden=True)], ids=["LM", "classifier"]
)
def test_the_second_generation_is_gated(bias, head):
    shape = NucleotideTransformerConfig(
        **{"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 12, "vocab_size": 30, "pad_vocab_size_multiple": 1},
        **{"pad_id": 1, "mask_id": 2, "mlp_bias": bias, "with_lm_head": head is None},
    )
    config, tensors, imported = written(shape, "esm", head)
    ids = ids_of(15, 3, 30)
    truth = esm_v2(below(tensors, "esm."), config, ids[0])
    close(imported.backbone(ids)[0], truth, 1e-5)
    if head is not None:
        W = below(tensors, "classifier.")
        hidden = torch.tanh(truth[0] @ W["dense.weight"].T + W["dense.bias"])
        close(imported.classifier(ids)[0], hidden @ W["out_proj.weight"].T + W["out_proj.bias"], 1e-5)


def test_positions_of_the_first_generation_end(tmp_path):
    _, config, tensors = official(tmp_path, "MaskedLM", **OPTIONS["NT v1"])
    backbone = published.read(InMemory(config, tensors)).backbone
    assert backbone.max_length == 38
    with pytest.raises(ValueError, match="takes at most 38"):
        backbone(ids_of(39, 4, 31))
