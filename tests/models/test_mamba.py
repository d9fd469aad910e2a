import pytest
import torch

from genossm.models import mamba
from genossm.models.mamba import Mamba2Config, MambaConfig
from genossm.optim import decayed_parameters


def state_values(state):
    return sum(tensor.numel() for layer in state["layers"] for tensor in layer.values())


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [({"d_model": 128, "n_layer": 4}, 468_608), ({"d_model": 256, "n_layer": 16}, 7_012_608)],
)
def test_sizes_are_those_published(shape, parameters):
    assert MambaConfig(**shape).build().num_parameters() == parameters


@pytest.mark.parametrize("config", [MambaConfig(d_model=16, n_layer=2), Mamba2Config(d_model=32, n_layer=2)])
def test_state_does_not_grow(config):
    model = config.build().eval()
    ids = torch.randint(7, 11, (1, 300))
    with torch.no_grad():
        _, short = model.extend(ids[:, :10], model.init_state(1))
        _, long = model.extend(ids[:, 10:], short)
    assert state_values(long) == state_values(short) == state_values(model.init_state(1))


@pytest.mark.parametrize("config", [MambaConfig(d_model=16, n_layer=2), Mamba2Config(d_model=32, n_layer=2)])
def test_pieces_of_inference_equal_training_at_once(config, monkeypatch):
    monkeypatch.setattr(mamba, "_PIECE", 64)
    model = config.build().eval()
    ids = torch.randint(7, 11, (2, 200), dtype=torch.uint8)
    whole = model(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), whole, atol=1e-5, rtol=1e-5)
        pieces = torch.cat(list(model.stream(ids, piece=37)), dim=1)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_decay_spares_rates_skips_and_steps():
    for model in (MambaConfig(d_model=16, n_layer=1).build(), Mamba2Config(d_model=32, n_layer=1).build()):
        names = {parameter: name for name, parameter in model.named_parameters()}
        decayed = {names[parameter] for parameter, decays in decayed_parameters(model) if decays}
        assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
        assert not any("norm" in name or "embedding" in name for name in decayed)


def test_fresh_steps_lie_in_their_range():
    model = MambaConfig(d_model=64, n_layer=2, dt_min=0.01, dt_max=0.02).build()
    for layer in model.layers:
        dt = torch.nn.functional.softplus(layer.mixer.dt_proj.bias)
        assert dt.min() > 0.0099
        assert dt.max() < 0.0201


def test_deeper_models_write_less_into_the_residual():
    stds = [MambaConfig(d_model=32, n_layer=n).build().layers[0].mixer.out_proj.weight.detach().std() for n in (1, 16)]
    assert float(stds[0] / stds[1]) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (MambaConfig, {"attn_layer_idx": [4]}, r"layers in 0\.\.3; got \[4\]"),
        (MambaConfig, {"attn_layer_idx": [1], "n_head": 5}, "multiple of n_head"),
        (MambaConfig, {"dt_rank": 0}, "dt_rank must be 'auto' or a positive"),
        (MambaConfig, {"dt_init": "zeros"}, "dt_init must be 'random' or 'constant'"),
        (MambaConfig, {"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        (MambaConfig, {"d_state": 0}, "d_state must be at least 1"),
        (MambaConfig, {"d_intermediate": -1}, "d_intermediate must not be negative"),
        (Mamba2Config, {"headdim": 48}, "multiple of headdim; got 256 and headdim=48"),
        (Mamba2Config, {"ngroups": 3}, "multiple of ngroups; got 3"),
        (Mamba2Config, {"dt_limit": [0.1, 0.01]}, "dt_limit"),
    ],
)
def test_impossible_shapes_are_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize("config", [MambaConfig, Mamba2Config])
def test_no_document_of_a_hybrid_leaks_into_another(config):
    model = config(d_model=64, n_layer=3, attn_layer_idx=[1], n_head=4, n_kv_head=2).build().eval()
    ids, starts = torch.randint(7, 11, (2, 30)), torch.zeros(2, 30, dtype=torch.bool)
    # The borders differ from row to row, and a row's first document needs no mark.
    starts[0, [0, 9, 10]] = starts[1, 17] = True
    x = model(ids, resets_BL=starts)
    changed = ids.clone()
    changed[0, 9] = 17 - changed[0, 9]
    changed[1, :17] = 17 - changed[1, :17]
    y = model(changed, resets_BL=starts)
    assert torch.equal(x[0, :9], y[0, :9])
    assert not torch.allclose(x[0, 9], y[0, 9], atol=1e-4)
    torch.testing.assert_close(x[0, 10:], y[0, 10:])
    torch.testing.assert_close(x[1, 17:], y[1, 17:])
    torch.testing.assert_close(x[1:, 17:], model(ids[1:, 17:]), atol=1e-5, rtol=1e-5)


def test_resets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"resets must be \(1, 4\)"):
        MambaConfig(d_model=16, n_layer=1).build().check(torch.full((1, 4), 7), None, torch.ones(1, 3).bool())
