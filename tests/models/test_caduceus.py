import pytest
import torch

from genossm.models.base import lengths_of
from genossm.models.caduceus import CaduceusConfig
from genossm.nn import mamba
from genossm.nn.rc import CHAR_COMPLEMENT, complement_tensor, reverse_complement


@pytest.mark.parametrize(
    ("d_model", "n_layer", "parameters"), [(118, 4, 470_702), (256, 4, 1_934_592), (256, 16, 7_725_312)]
)
@pytest.mark.parametrize("rcps", [False, True])
def test_sizes_are_those_published(d_model, n_layer, parameters, rcps):
    assert CaduceusConfig(d_model=d_model, n_layer=n_layer, rcps=rcps).build().num_parameters() == parameters


def stored_halves(model, ids):
    """Run a PS model as the released code stores it: halves flipped in memory, exchanged at every block if fused."""
    complement = complement_tensor(CHAR_COMPLEMENT, model.config.padded_vocab_size)

    def turn(x):
        return x.flip(1, 2)

    first = model.embedding(ids)
    second = turn(model.embedding(reverse_complement(ids, complement)))

    def block(layer, x):
        return x + layer.mixer(layer.norm1(x))

    for layer in model.layers:
        if model.config.fused_add_norm:
            first, second = second, first
        first, second = block(layer, first), turn(block(layer, turn(second)))
    norm = model.norm_f.norm
    return torch.cat([norm(first), turn(norm(turn(second)))], dim=-1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("bidirectional_strategy", ["add", "ew_multiply"])
def test_both_conventions_equal_their_definition(fused, n_layer, bidirectional_strategy):
    config = CaduceusConfig(
        d_model=6,
        n_layer=n_layer,
        d_state=4,
        rcps=True,
        fused_add_norm=fused,
        bias=True,
        rms_norm=False,
        bidirectional_strategy=bidirectional_strategy,
    )
    model = config.build().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(7, 11, (2, 19))
    torch.testing.assert_close(model(ids), stored_halves(model, ids), atol=1e-5, rtol=1e-5)


def test_the_conventions_differ():
    models = [CaduceusConfig(d_model=8, n_layer=2, rcps=True, fused_add_norm=f).build() for f in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(7, 11, (1, 33))
    assert not torch.allclose(models[0](ids), models[1](ids), atol=1e-3)


@pytest.mark.parametrize(("tied", "projections"), [(True, 2), (False, 4)])
def test_tied_projections_run_once(tied, projections, monkeypatch):
    calls, weights = [], mamba._weights
    monkeypatch.setattr(mamba, "_weights", lambda *given: calls.append(1) or weights(*given))
    model = CaduceusConfig(d_model=16, n_layer=1, bidirectional_weight_tie=tied).build()
    model(torch.randint(7, 11, (1, 9)))
    assert len(calls) == projections
    assert (model.layers[0].mixer.mamba_rev.in_proj is None) == tied


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"complement_map": [1, 2, 0]}, "must be its own inverse; id 0 maps to 1"),
        ({"complement_map": [0, 9]}, "must be its own inverse; id 1 maps to 9"),
        ({"complement_map": list(range(17))}, "has 17 ids, the vocabulary 16"),
        ({"bidirectional_strategy": "mean"}, "one of add, ew_multiply; got 'mean'"),
    ],
)
def test_impossible_shapes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CaduceusConfig(d_model=8, n_layer=1, rcps=True, **values).build()


def test_a_mask_with_a_hole_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="what stands behind a hole would be read as if"):
        lengths_of(torch.tensor([[True, False, True]]))


@pytest.mark.parametrize("ids", [torch.full((1, 4), 16), torch.full((1, 4), -1)])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match=r"Ids must be in 0\.\.15"):
        CaduceusConfig(d_model=8, n_layer=1, rcps=True).build()(ids)


def test_ids_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"whole numbers; got torch\.float32"):
        CaduceusConfig(d_model=8, n_layer=1).build().check(torch.full((1, 4), 7.5))


@pytest.mark.parametrize("mask", [torch.ones(4), torch.ones(2, 3, 1), torch.zeros(1, 3)], ids=["1-d", "3-d", "empty"])
def test_a_mask_of_another_shape_or_an_empty_row_is_refused(mask):
    with pytest.raises(ValueError, match=r"must be \(batch, length\)|no hole and no empty row"):
        lengths_of(mask)


@pytest.mark.parametrize("lengths", [[4], [0, 4], [4, 5]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must be \(batch,\) = \(2,\)|Each length must be in 1\.\.4"):
        CaduceusConfig(d_model=8, n_layer=1).build().check(torch.full((2, 4), 7), torch.tensor(lengths))


def test_both_strands_go_through_each_layer_at_once(monkeypatch):
    model = CaduceusConfig(d_model=8, n_layer=3, rcps=True).build()
    batches, mix = [], mamba.BiMamba.forward
    monkeypatch.setattr(
        mamba.BiMamba, "forward", lambda self, x, *a, **k: batches.append(len(x)) or mix(self, x, *a, **k)
    )
    model(torch.randint(7, 11, (2, 9)))
    assert batches == [4, 4, 4]


def test_a_layer_turns_no_sequence_in_memory(monkeypatch):
    model = CaduceusConfig(d_model=8, n_layer=1).build()
    ids, turned, flip = torch.randint(7, 11, (2, 9)), [], torch.Tensor.flip
    monkeypatch.setattr(torch.Tensor, "flip", lambda x, *dims: turned.append(x.shape) or flip(x, *dims))
    for lengths in (None, torch.tensor([9, 4])):
        model(ids, lengths)
    assert not turned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_too_long_for_half_precision_forget_all_and_stay_finite(dtype):
    model = CaduceusConfig(d_model=8, n_layer=1, rcps=True).build().eval().to(dtype)
    for parameter in (model.layers[0].mixer.mamba_fwd.dt_proj.bias, model.layers[0].mixer.mamba_rev.dt_proj.bias):
        torch.nn.init.constant_(parameter, 60_000 if dtype == torch.float16 else 1e30)
    with torch.no_grad():
        assert model(torch.randint(7, 11, (2, 9))).isfinite().all()
