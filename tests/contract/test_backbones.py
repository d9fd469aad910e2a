"""What every backbone of the shelf promises. A new one is found by its file and asked the same."""

import pytest
import torch

from genossm import checkpoint
from genossm.models.base import config_from_dict, model_types

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
    "cnn": [
        {"d_model": 8, "n_layer": 3, "kernel_size": 3, "dilation_cycle": 2},
        {"d_model": 8, "n_layer": 4, "kernel_size": 5, "causal": False, "tie_embeddings": False},
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


def test_gradient_checkpointing_changes_neither_numbers_nor_keys(model):
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
