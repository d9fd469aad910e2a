"""What every backbone of the shelf promises. A new one is found by its file and asked the same."""

import pytest
import torch

from genossm import checkpoint
from genossm.models.base import config_from_dict, model_types
from genossm.models.equivariant import EquivariantConfig
from genossm.nn.rc import CHAR_COMPLEMENT, complement_tensor, reverse_complement
from genossm.testing import assert_close

TINY = {
    "hyenadna": [
        {"d_model": 16, "n_layer": 2, "max_length": 64},
        {"d_model": 16, "n_layer": 1, "max_length": 64, "order": 3},
        {"d_model": 16, "n_layer": 1, "max_length": 41, "own_positions": True, "own_decay": True},
        {"d_model": 16, "n_layer": 2, "max_length": 64, "bidirectional": True},
    ],
    "transformer": [
        {"d_model": 16, "n_layer": 2, "n_head": 2},
        {"d_model": 24, "n_layer": 1, "n_head": 6, "n_kv_head": 2, "bias": False, "tie_embeddings": False},
        {"d_model": 16, "n_layer": 2, "n_head": 4, "causal": False},
    ],
    "nucleotide_transformer": [
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 13},
        {
            **{"d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 24, "vocab_size": 16, "positions": "absolute"},
            **{"activation": "gelu", "mlp_bias": True, "norm_before": True, "tie_embeddings": True},
            **{"max_positions": 46},
        },
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 12, "rescale_masked": True},
    ],
    "striped_hyena": [
        {"d_model": 16, "n_layer": 3, "n_head": 2, "d_state": 3, "vocab_size": 16},
        {
            **{"d_model": 24, "n_layer": 2, "n_head": 6, "n_kv_head": 2, "attn_layer_idx": (0,), "vocab_size": 16},
            **{"column_split": False, "activation": "silu", "final_norm": False, "rotary_scaling": 4.0},
        },
        {"d_model": 16, "n_layer": 2, "n_head": 2, "attn_layer_idx": (), "short_filter_bias": False, "vocab_size": 12},
    ],
    "cnn": [
        {"d_model": 8, "n_layer": 3, "kernel_size": 3, "dilation_cycle": 2},
        {"d_model": 8, "n_layer": 4, "kernel_size": 5, "causal": False, "tie_embeddings": False},
    ],
    "mamba": [
        {"d_model": 16, "n_layer": 2, "d_state": 4},
        {
            "d_model": 12,
            "n_layer": 2,
            "d_state": 3,
            "bias": True,
            "d_conv": 3,
            "rms_norm": False,
            "tie_embeddings": False,
        },
        {"d_model": 16, "n_layer": 3, "d_state": 4, "attn_layer_idx": [1], "n_head": 2, "d_intermediate": 20},
    ],
    "mamba2": [
        {"d_model": 16, "n_layer": 2, "d_state": 8, "headdim": 8},
        {"d_model": 16, "n_layer": 1, "d_state": 4, "headdim": 8, "ngroups": 2, "D_has_hdim": True, "d_ssm": 16},
        {"d_model": 16, "n_layer": 2, "d_state": 4, "headdim": 4, "rmsnorm": False, "dt_limit": [0.001, 0.1]},
    ],
    "caduceus": [
        {"d_model": 16, "n_layer": 2, "d_state": 4},
        {"d_model": 12, "n_layer": 1, "d_state": 4, "bidirectional_weight_tie": False, "bias": True, "rms_norm": False},
        {"d_model": 12, "n_layer": 2, "d_state": 4, "bidirectional_strategy": "ew_multiply", "bias": True},
        {"d_model": 12, "n_layer": 2, "d_state": 4, "bidirectional": False},
        {"d_model": 8, "n_layer": 2, "d_state": 4, "rcps": True},
        {"d_model": 7, "n_layer": 3, "d_state": 4, "rcps": True, "bias": True, "tie_embeddings": False},
        {"d_model": 8, "n_layer": 2, "d_state": 4, "rcps": True, "fused_add_norm": False},
        {"d_model": 8, "n_layer": 1, "d_state": 4, "rcps": True, "bidirectional": False, "fused_add_norm": False},
    ],
    "equivariant": [
        {"backbone": {"model_type": "hyenadna", "d_model": 8, "n_layer": 1, "max_length": 64, "embed_dropout": 0.0}},
        {"backbone": {"model_type": "caduceus", "d_model": 8, "n_layer": 1, "d_state": 4}},
    ],
}
"""Small shapes of each backbone; every `model_type` must have at least one."""

CASES = [(name, values) for name, shapes in TINY.items() for values in shapes]


@pytest.fixture(params=CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def model(request):
    name, values = request.param
    torch.manual_seed(1)
    return config_from_dict({"model_type": name, **values}).build().eval()


def draw_ids(batch=3, length=41):
    return torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(5))


def test_every_backbone_is_tried():
    assert set(TINY) == set(model_types())


def test_one_vector_a_position(model):
    ids = draw_ids()
    x = model(ids)
    assert x.shape == (3, 41, model.d_output)
    assert model.logits(x).shape == (3, 41, model.config.padded_vocab_size)


def test_causal_never_looks_ahead(model):
    ids = draw_ids()
    changed = ids.clone()
    changed[:, 20:] = 17 - changed[:, 20:]
    before, after = model(ids), model(changed)
    if model.causal:
        torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-5, rtol=1e-5)
    else:
        assert not torch.allclose(before[:, :20], after[:, :20], atol=1e-4)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-4)


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model.logits(model(draw_ids())).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


def test_right_padding_changes_no_real_position(model):
    ids, lengths = draw_ids(), torch.tensor([41, 13, 1])
    padded = ids.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 4
    together = model(padded, lengths)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_save_and_load_give_equal_outputs(model, tmp_path):
    checkpoint.save(model, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert again.config == model.config
    torch.testing.assert_close(again(draw_ids()), model(draw_ids()), atol=0, rtol=0)


def test_same_seed_same_weights(model):
    torch.manual_seed(7)
    first = model.config.build().state_dict()
    torch.manual_seed(7)
    second = model.config.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_neither_numbers_nor_keys(model, monkeypatch):
    monkeypatch.setattr("genossm.models.base._KEPT_BYTES", 0)
    for dropout in model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    model.train()
    keys, plain = (
        list(model.state_dict()),
        torch.autograd.grad(model(draw_ids()).square().mean(), model.parameters(), allow_unused=True),
    )
    model.gradient_checkpointing = True
    again = torch.autograd.grad(model(draw_ids()).square().mean(), model.parameters(), allow_unused=True)
    assert list(model.state_dict()) == keys
    for one, other in zip(plain, again, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


def test_gradient_checkpointing_holds_little_of_long_inputs_and_all_of_short_ones(model, monkeypatch):
    model.train()
    held = []
    for model.gradient_checkpointing, most in ((False, 0), (True, 1 << 24), (True, 0)):
        monkeypatch.setattr("genossm.models.base._KEPT_BYTES", most)
        total = 0

        def count(kept):
            nonlocal total
            total += kept.nbytes
            return kept

        with torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
            model(draw_ids())
        held.append(total)
    assert held[0] == held[1]
    assert held[2] < held[0] / 2


def test_step_by_step_equals_all_at_once(model):
    if not model.streams:
        with pytest.raises(ValueError, match="token by token"):
            model.init_state(1)
        return
    ids = draw_ids()
    whole = model(ids)
    state = model.init_state(3)
    steps = []
    for t in range(ids.shape[1]):
        x, state = model.step(ids[:, t], state)
        steps.append(x)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_any_pieces_equal_the_whole(model):
    if not model.streams:
        return
    ids = draw_ids()
    state, pieces = model.init_state(3), []
    for piece in ids.split((17, 1, 2, 20, 1), dim=1):
        x, state = model.extend(piece, state)
        pieces.append(x)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)


def assert_equivariant(model):
    """The reverse complement of a row gives its vectors turned in time and in channels, its logits complemented."""
    ids, lengths = draw_ids(), torch.tensor([41, 13, 1])
    complement = complement_tensor(CHAR_COMPLEMENT, model.config.padded_vocab_size)
    turned = reverse_complement(ids, complement, lengths)
    for given, other, rows in ((ids, turned, lengths), (ids, reverse_complement(ids, complement), None)):
        x, x_turned = model(given, rows), model(other, rows)
        logits, logits_turned = model.logits(x), model.logits(x_turned)
        for row in range(3):
            n = 41 if rows is None else int(lengths[row])
            torch.testing.assert_close(x_turned[row, :n].flip(0, 1), x[row, :n], atol=1e-5, rtol=1e-5)
            assert_close(logits_turned[row, :n].flip(0)[:, complement], logits[row, :n])


def test_equivariant_ones_commute_with_the_reverse_complement(model):
    if model.equivariant:
        assert_equivariant(model)
    else:
        with pytest.raises(AssertionError):
            assert_equivariant(model)


def test_the_wrapper_makes_any_backbone_equivariant(model):
    wrapped = EquivariantConfig(backbone=model.config).build().eval()
    assert wrapped.equivariant
    assert_equivariant(wrapped)


def test_packed_documents_see_nothing_of_one_another(model):
    ids, starts = draw_ids(), [0, 7, 8, 30]
    resets = torch.zeros(3, 41, dtype=torch.bool)
    resets[:, starts] = True
    lengths = torch.tensor([41, 40, 35])
    if not model.packs:
        with pytest.raises(ValueError, match="can't keep packed documents apart"):
            model(ids, lengths, resets)
        return
    packed = model(ids, lengths, resets)
    for row, end in enumerate(lengths.tolist()):
        for first, last in zip(starts, [*starts[1:], end], strict=True):
            alone = model(ids[row : row + 1, first:last])
            torch.testing.assert_close(packed[row, first:last], alone[0], atol=1e-5, rtol=1e-5)


def test_the_stream_after_each_block_ends_in_the_output(model):
    ids, seen = draw_ids(), []
    x = model.run_layers(model.embed(ids), visit=lambda index, x: seen.append(x))
    assert len(seen) == len(model.layers)
    torch.testing.assert_close(seen[-1], x)
    torch.testing.assert_close(model.norm_f(x), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
        (torch.full((1, 4), 99), "Ids must be in"),
        (torch.full((1, 4), -1), "Ids must be in"),
    ],
)
def test_impossible_ids_are_refused(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model(ids)
