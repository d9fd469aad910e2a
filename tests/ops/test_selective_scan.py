import inspect

import pytest
import torch

from genossm.ops.backend import use_backend
from genossm.ops.kernels import selective_scan_torch
from genossm.ops.rows import check_rows
from genossm.ops.selective_scan import selective_scan, selective_scan_ref, selective_scan_step
from genossm.testing import assert_close, assert_equals_reference


def draw_inputs(batch, length, width, states, dtype=torch.float64, bare=False, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=gen)

    drawn = {
        "u_BLE": draw(batch, length, width),
        "dt_BLE": draw(batch, length, width),
        "A_EN": -draw(width, states).exp(),
        "B_BLN": draw(batch, length, states),
        "C_BLN": draw(batch, length, states),
    }
    if not bare:
        drawn |= {
            "D_E": draw(width),
            "z_BLE": draw(batch, length, width),
            "dt_bias_E": draw(width),
            "initial_state_BEN": draw(batch, width, states),
        }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in drawn.items()}


def test_torch_equals_reference_forward_and_backward(rows):
    with use_backend("torch"):
        assert_equals_reference(selective_scan, selective_scan_ref, draw_inputs(2, 37, 5, 3), rows)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 150, 3, 2)])
def test_torch_over_several_chunks(shape, reverse):
    options = {"reverse": reverse, "return_state": True, "resets_BL": torch.rand(shape[:2]) < 0.05}
    with use_backend("torch"):
        assert_equals_reference(selective_scan, selective_scan_ref, draw_inputs(*shape), options)


@pytest.mark.parametrize("reverse", [False, True])
def test_torch_over_several_stretches_of_short_chunks(reverse, monkeypatch):
    for name, value in (("_SPAN", 48), ("_CHUNK_VALUES", 1), ("_TRAINED_CHUNK_VALUES", 1)):
        monkeypatch.setattr(selective_scan_torch, name, value)
    options = {"reverse": reverse, "lengths_B": torch.tensor([150, 70]), "resets_BL": torch.rand(2, 150) < 0.05}
    inputs = draw_inputs(2, 150, 3, 2)
    with use_backend("torch"):
        assert_equals_reference(selective_scan, selective_scan_ref, inputs, {**options, "return_state": True})
        with torch.no_grad():
            assert_close(selective_scan(**inputs, **options), selective_scan_ref(**inputs, **options))


def test_numba_equals_reference_forward_and_backward(rows):
    with use_backend("numba"):
        assert_equals_reference(selective_scan, selective_scan_ref, draw_inputs(2, 37, 5, 3, dtype=torch.float32), rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 63, 1, 16), (2, 65, 300, 2), (3, 131, 17, 1)])
def test_numba_at_odd_sizes(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    options = {"reverse": shape[0] == 2, "return_state": True}
    with use_backend("numba"):
        assert_equals_reference(selective_scan, selective_scan_ref, draw_inputs(*shape, dtype=torch.float32), options)


def test_numba_without_options():
    inputs = draw_inputs(2, 37, 5, 3, dtype=torch.float32, bare=True)
    with use_backend("numba"):
        assert_equals_reference(selective_scan, selective_scan_ref, inputs, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["numba", "torch"])
def test_half_precision_is_computed_in_float32(name, dtype):
    inputs = draw_inputs(1, 33, 5, 3, dtype=dtype)
    with use_backend(name):
        assert_equals_reference(selective_scan, selective_scan_ref, inputs, {})


@pytest.mark.parametrize("name", ["numba", "torch", "reference"])
def test_extreme_steps_and_rates_stay_finite(name):
    # In half precision exp(dt) overflows at 11.1: steps of 60,000 must decay to 0, not to NaN.
    inputs = draw_inputs(1, 5, 3, 2, dtype=torch.float16)
    inputs["dt_BLE"] = torch.full_like(inputs["dt_BLE"], 6e4)
    inputs["dt_BLE"][:, 2] = -6e4
    inputs["A_EN"] = torch.full_like(inputs["A_EN"], -6e4)
    inputs["u_BLE"] = inputs["u_BLE"] * 1e-4
    with use_backend(name):
        y, state = selective_scan(**inputs, return_state=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_a_nan_comes_out_from_where_it_goes_in(name):
    for field in ("u_BLE", "dt_BLE", "B_BLN"):
        inputs = draw_inputs(1, 9, 3, 2, dtype=torch.float32)
        inputs[field] = inputs[field].detach().clone()
        inputs[field][0, 4, 0] = torch.nan
        with use_backend(name):
            y = selective_scan(**inputs)
        assert torch.isnan(y[0, 4:, 0]).all()
        assert torch.isfinite(y[0, :4]).all()


def test_growing_states_and_float64_go_to_torch():
    inputs = draw_inputs(1, 9, 3, 2, dtype=torch.float32, bare=True)
    inputs["A_EN"] = -inputs["A_EN"]
    assert_equals_reference(selective_scan, selective_scan_ref, inputs, {})
    with use_backend("numba"), pytest.raises(ValueError, match="has no backend 'numba'"):
        selective_scan(**inputs)


@pytest.mark.parametrize("softplus", [True, False])
def test_torch_without_options(softplus):
    inputs = draw_inputs(2, 37, 5, 3, bare=True)
    inputs["dt_BLE"] = inputs["dt_BLE"].detach().abs()
    with use_backend("torch"):
        assert_equals_reference(selective_scan, selective_scan_ref, inputs, {"dt_softplus": softplus})


@pytest.mark.parametrize("kind", ["plain", "reverse"])
def test_halves_with_a_carried_state_equal_the_whole(kind):
    inputs = draw_inputs(2, 50, 5, 3)
    reverse = kind == "reverse"
    whole, last = selective_scan(**inputs, reverse=reverse, return_state=True)
    state, parts = inputs["initial_state_BEN"], {}
    for span in [slice(21, 50), slice(0, 21)] if reverse else [slice(0, 21), slice(21, 50)]:
        part = {k: v[:, span] if k in ("u_BLE", "dt_BLE", "B_BLN", "C_BLN", "z_BLE") else v for k, v in inputs.items()}
        part["initial_state_BEN"] = state
        parts[span.start], state = selective_scan(**part, reverse=reverse, return_state=True)
    assert_close(torch.cat([parts[0], parts[21]], dim=1), whole)
    assert_close(state, last)


def test_a_row_gives_what_it_gives_alone_whatever_stands_in_the_padding():
    inputs = draw_inputs(2, 40, 5, 3)
    for name in ("u_BLE", "dt_BLE", "z_BLE"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][1, 13:] = 1e4
    for reverse in (False, True):
        y, state = selective_scan(**inputs, lengths_B=torch.tensor([40, 13]), reverse=reverse, return_state=True)
        alone = {
            k: v[1:2, :13] if k in ("u_BLE", "dt_BLE", "B_BLN", "C_BLN", "z_BLE") else v for k, v in inputs.items()
        }
        alone["initial_state_BEN"] = inputs["initial_state_BEN"][1:2]
        y_alone, state_alone = selective_scan(**alone, reverse=reverse, return_state=True)
        assert_close(y[1:2, :13], y_alone)
        assert_close(state[1:2], state_alone)
        assert not y[1, 13:].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_give_what_each_gives_alone(reverse):
    inputs = draw_inputs(1, 40, 5, 3)
    del inputs["initial_state_BEN"]
    starts = [0, 7, 8, 30]
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, starts] = True
    packed = selective_scan(**inputs, resets_BL=resets, reverse=reverse)
    for start, end in zip(starts, [*starts[1:], 40], strict=True):
        alone = {
            k: v[:, start:end] if k in ("u_BLE", "dt_BLE", "B_BLN", "C_BLN", "z_BLE") else v for k, v in inputs.items()
        }
        assert_close(packed[:, start:end], selective_scan(**alone, reverse=reverse))


def test_step_by_step_equals_all_at_once():
    inputs = draw_inputs(2, 9, 5, 3)
    whole, last = selective_scan(**inputs, return_state=True)
    state = inputs.pop("initial_state_BEN")
    for t in range(9):
        y, state = selective_scan_step(
            *(inputs[name][:, t] for name in ("u_BLE", "dt_BLE")),
            inputs["A_EN"],
            *(inputs[name][:, t] for name in ("B_BLN", "C_BLN")),
            inputs["D_E"],
            inputs["z_BLE"][:, t],
            inputs["dt_bias_E"],
            state_BEN=state,
        )
        assert_close(y, whole[:, t])
    assert_close(state, last)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((torch.tensor([3]), None, 2, 5), r"lengths must be \(batch,\) = \(2,\)"),
        ((None, torch.zeros(2, 4, dtype=torch.bool), 2, 5), r"resets must be \(batch, length\) = \(2, 5\)"),
        ((None, None, 2, 0), "length 0"),
        ((torch.tensor([3, 9]), None, 2, 5), r"Each length must be in 0\.\.5; got \[3, 9\]"),
        ((torch.tensor([-1, 5]), None, 2, 5), r"Each length must be in 0\.\.5"),
    ],
)
def test_rows_of_another_shape_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        check_rows(*rows)


@pytest.mark.parametrize("name", ["dt_BLE", "A_EN", "B_BLN", "C_BLN", "D_E", "z_BLE", "dt_bias_E", "initial_state_BEN"])
def test_tensors_that_do_not_fit_are_refused_before_a_kernel_reads_beyond_them(name):
    inputs = draw_inputs(2, 7, 5, 3)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"{'B_BLN' if name == 'A_EN' else name} must be .* to fit the others"):
        inspect.unwrap(selective_scan)(**inputs)
