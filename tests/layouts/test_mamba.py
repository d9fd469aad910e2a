"""Published Mamba and Mamba-2 beyond the fixtures: a plain restatement, and transformers' own classes."""

import pytest
import torch

from genossm import published, source
from genossm.models.mamba import Mamba2Config, MambaConfig
from layouts.restated import below, mamba_lm
from layouts.written import InMemory, close, ids_of, written

FIRST = {"d_model": 16, "n_layer": 2, "d_state": 4, "vocab_size": 12}
SECOND = {**FIRST, "headdim": 8}
VARIANTS = {
    "LayerNorm, biases, untied": MambaConfig(**FIRST, rms_norm=False, bias=True, conv_bias=False, tie_embeddings=False),
    "rank, taps, width, padding": MambaConfig(**FIRST, dt_rank=3, d_conv=2, expand=3, pad_vocab_size_multiple=5),
    "with an MLP": MambaConfig(**FIRST, d_intermediate=20),
    "hybrid": MambaConfig(**FIRST, attn_layer_idx=(1,), n_head=4, n_kv_head=2, rotary_base=500.0, d_intermediate=8),
    "second, groups": Mamba2Config(**SECOND, ngroups=2, bias=True, tie_embeddings=False),
    "second, groups, norm before the gate": Mamba2Config(**SECOND, ngroups=2, norm_before_gate=True),
    "second, part scanned, wide skip": Mamba2Config(**SECOND, d_ssm=16, D_has_hdim=True, conv_bias=False),
    "second, no norm, limits": Mamba2Config(**SECOND, rmsnorm=False, dt_limit=(0.01, 0.5), rms_norm=False),
    "second, hybrid with an MLP": Mamba2Config(**SECOND, attn_layer_idx=(0,), n_head=2, d_intermediate=130),
}


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_the_numbers_are_those_of_the_published_form(shape):
    config, tensors, imported = written(shape, shape.model_type)
    ids = ids_of(high=12)
    W = below(tensors, "backbone.")
    truth = mamba_lm(W, config, ids[0])
    states = imported.backbone(ids)
    close(states[0], truth)
    weight = tensors.get("lm_head.weight", tensors["backbone.embedding.weight"]).double()
    close(imported.backbone.logits(states)[0], truth @ weight.T)
    state, rows = imported.backbone.init_state(1), []
    with torch.no_grad():
        for column in ids.unbind(1):
            row, state = imported.backbone.step(column, state)
            rows.append(row)
    close(torch.cat(rows), truth)


def official(folder, kind, **options):
    """Return transformers' model of a random tiny shape, every weight drawn, and what it saves: config and tensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    config.architectures = [f"{kind}ForCausalLM"]
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    files = source.find(folder)
    return model, files.read_config(), files.read_tensors()


SHAPES = {
    "Mamba tied": ("Mamba", {"state_size": 4, "use_bias": True}),
    "Mamba untied": ("Mamba", {"state_size": 3, "use_conv_bias": False, "tie_word_embeddings": False, "expand": 3}),
    "Mamba rank": ("Mamba", {"state_size": 4, "time_step_rank": 5, "conv_kernel": 3, "layer_norm_epsilon": 1e-3}),
    "Mamba-2 groups": ("Mamba2", {"state_size": 8, "n_groups": 2, "num_heads": 4, "head_dim": 8}),
    "Mamba-2 tied": (
        "Mamba2",
        {"state_size": 8, "n_groups": 1, "num_heads": 8, "head_dim": 4, "tie_word_embeddings": True},
    ),
    "Mamba-2 biases": (
        "Mamba2",
        {**{"state_size": 8, "n_groups": 4, "num_heads": 4, "head_dim": 8}, "use_bias": True, "use_conv_bias": False},
    ),
    "Mamba-2 limits": (
        "Mamba2",
        {"state_size": 8, "n_groups": 2, "num_heads": 4, "head_dim": 8, "time_step_limit": (0.02, 0.3)},
    ),
}


@pytest.mark.parametrize(("kind", "options"), SHAPES.values(), ids=SHAPES)
def test_the_numbers_are_those_of_transformers(kind, options, tmp_path):
    model, config, tensors = official(
        tmp_path, kind, **{"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 13, "use_cache": False, **options}
    )
    imported = published.read(InMemory(config, tensors))
    again = published.write(imported.backbone, imported.origin.layout, imported.origin)[1]
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    backbone, ids = imported.backbone, ids_of(23, 0, 13, rows=2)
    logits = backbone.logits(backbone(ids))
    output = model(ids, labels=ids)
    torch.testing.assert_close(logits, output.logits, atol=2e-5, rtol=1e-4)
    output.loss.backward()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in backbone.named_parameters():
        published_name = published.layouts()[imported.origin.layout].theirs(name, backbone.config)
        truth = theirs[published_name]
        torch.testing.assert_close(parameter.grad.norm(), truth.norm(), atol=1e-6, rtol=1e-3, msg=published_name)
    fresh = published.write(backbone, imported.origin.layout)
    reread = published.read(InMemory(*fresh))
    assert torch.equal(reread.backbone.logits(reread.backbone(ids)), logits)
