import pytest
import torch

from genossm.models.hyenadna import HyenaDNAConfig


@pytest.mark.parametrize("order", [2, 3])
def test_prompt_then_steps_then_a_piece_equal_all_at_once(order):
    model = HyenaDNAConfig(d_model=8, n_layer=2, max_length=64, order=order).build().eval()
    ids = torch.randint(7, 11, (2, 60))
    state, outputs = model.init_state(2), []
    for piece in ids.split([23, 1, 1, 1, 20, 14], dim=1):
        x, state = model.extend(piece, state)
        outputs.append(x)
    torch.testing.assert_close(torch.cat(outputs, 1).detach(), model(ids).detach(), atol=1e-5, rtol=1e-5)


def test_state_ends_where_the_filter_does():
    model = HyenaDNAConfig(d_model=8, n_layer=1, max_length=10).build().eval()
    _, state = model.extend(torch.full((1, 10), 7), model.init_state(1))
    with pytest.raises(ValueError, match="11 tokens; this model takes at most 10"):
        model.step(torch.tensor([7]), state)


def test_changed_weights_change_the_kept_filter():
    model = HyenaDNAConfig(d_model=8, n_layer=1, max_length=32).build().eval()
    ids = torch.randint(7, 11, (1, 20))
    model.extend(ids, model.init_state(1))
    with torch.no_grad():
        for parameter in model.layers[0].mixer.filter_fn.parameters():
            parameter.mul_(1.5)
    x, _ = model.extend(ids, model.init_state(1))
    torch.testing.assert_close(x.detach(), model(ids).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [50, 1500])
def test_inference_in_pieces_equals_training(length, monkeypatch):
    monkeypatch.setattr("genossm.nn.hyena._LONG", {"cpu": 1})
    monkeypatch.setattr("genossm.nn.hyena._CHANNELS", {"cpu": 5})
    model = HyenaDNAConfig(d_model=16, n_layer=2, max_length=1600).build().eval()
    ids = torch.randint(7, 11, (2, length))
    with torch.no_grad():
        pieces = model(ids)
    torch.testing.assert_close(pieces, model(ids).detach(), atol=1e-5, rtol=1e-5)
