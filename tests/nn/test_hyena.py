import pytest
import torch

from genossm.models.hyenadna import HyenaDNAConfig
from genossm.nn.hyena import HyenaOperator, _keeping
from genossm.testing import assert_close


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


@pytest.fixture
def long(monkeypatch):
    """Short inputs go the way of long ones."""
    monkeypatch.setattr("genossm.nn.hyena._LONG", {"cpu": 1})
    monkeypatch.setattr("genossm.nn.hyena._POSITIONS", 64)
    model = HyenaDNAConfig(d_model=24, n_layer=2, max_length=300).build().eval()
    ids = torch.randint(7, 11, (2, 200))
    return model, ids, [layer.mixer.filter_fn for layer in model.layers]


@torch.no_grad()
def test_filters_are_kept_from_the_second_input_on(long):
    model, ids, filters = long
    first = model(ids)
    assert [f.spectrum_bytes for f in filters] == [0, 0]
    assert torch.equal(model(ids), first)
    assert [f.spectrum_bytes for f in filters] == [24 * 241 * 8] * 2
    assert torch.equal(model(ids), first)
    torch.testing.assert_close(model(ids[:, :77]), first[:, :77], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_changed_weights_change_the_kept_transform(long):
    model, ids, filters = long
    before = [model(ids) for _ in range(3)][-1]
    for parameter in filters[0].parameters():
        parameter.mul_(1.5)
    after = model(ids)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(model(ids), after)


def test_a_gradient_drops_the_kept_transform(long):
    model, ids, filters = long
    with torch.no_grad():
        model(ids), model(ids)
    model(ids).sum().backward()
    assert [f.spectrum_bytes for f in filters] == [0, 0]


@torch.no_grad()
def test_what_has_no_room_is_made_each_time(long, monkeypatch):
    model, ids, filters = long
    monkeypatch.setattr("genossm.nn.hyena._KEPT_BYTES", 24 * 241 * 8 + sum(f.spectrum_bytes for f in _keeping))
    outputs = [model(ids) for _ in range(3)]
    assert [f.spectrum_bytes > 0 for f in filters] == [True, False]
    assert torch.equal(outputs[0], outputs[-1])


def test_what_is_saved_with_the_weights_can_be_read_safely(tmp_path):
    model = HyenaDNAConfig(d_model=8, n_layer=1, max_length=32).build()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True).keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"order": 3}])
def test_float16_holds_convolutions_that_leave_its_range(options):
    torch.manual_seed(0)
    length, order = 1 << 15, options.get("order", 2)
    operator = HyenaOperator(4, length, **options)
    with torch.no_grad():
        # Filters of one sign and inputs far from zero add up over the whole length.
        operator.in_proj.bias.fill_(20 if order == 2 else 2.5)
        operator.out_proj.weight *= 0.02 if order == 2 else 1e-3
        operator.filter_fn.implicit_filter[-1].weight.abs_()
        for layer in operator.filter_fn.implicit_filter[:-1:2]:
            layer.bias.fill_(0.15)
    x_BLD = torch.randn(1, length, 4, requires_grad=True)
    inputs, weight_BLD = [x_BLD, *operator.parameters()], torch.randn(1, length, 4) / 1024
    wants = operator(x_BLD)
    gradients = torch.autograd.grad(wants, inputs, weight_BLD)
    with torch.autocast("cpu", torch.float16):
        got = operator(x_BLD)
        with torch.no_grad():
            # The second time filters that were kept would be taken.
            alone = [operator(x_BLD) for _ in range(2)]
            if operator.filter_reverse_fn is None:
                alone.append(operator.extend(x_BLD, operator.init_state(1))[0])
    assert got.dtype == torch.float16
    assert wants.abs().max() < 1e4
    assert_close(got, wants)
    for result in alone:
        assert_close(result, wants)
    for one, other in zip(torch.autograd.grad(got, inputs, weight_BLD.half()), gradients, strict=True):
        assert one.isfinite().all()
        assert (one - other).abs().max() <= 0.02 * other.abs().max()


def test_positions_of_short_inputs_are_kept_where_they_last():
    layer = HyenaOperator(8, 64).filter_fn
    with torch.inference_mode():
        layer.positions(20)
    assert not layer._positions
    kept = layer.positions(20)
    assert all(one is other for one, other in zip(kept, layer.positions(20), strict=True))
    for length in range(1, 40):
        layer.positions(length)
    assert len(layer._positions) == 8
    fresh = HyenaOperator(8, 64).filter_fn.positions(20)
    assert all(torch.equal(one, other) for one, other in zip(kept, fresh, strict=True))
    assert layer.double().positions(20)[0].dtype == torch.float64
