import inspect

import pytest
import torch

from genossm.ops.backend import use_backend
from genossm.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref, causal_conv1d_step
from genossm.testing import assert_close, assert_equals_reference


def draw_inputs(batch, length, width, taps, dtype=torch.float64, bare=False):
    gen = torch.Generator().manual_seed(0)
    shapes = {"x_BLE": (batch, length, width), "w_EW": (width, taps)}
    if not bare:
        shapes |= {"bias_E": (width,), "initial_state_BEW1": (batch, width, taps - 1)}
    return {name: torch.randn(*shape, dtype=torch.float64, generator=gen).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("activation", [None, "silu"])
def test_torch_equals_reference_forward_and_backward(rows, activation):
    with use_backend("torch"):
        assert_equals_reference(
            causal_conv1d, causal_conv1d_ref, draw_inputs(2, 37, 5, 4), {**rows, "activation": activation}
        )


@pytest.mark.parametrize("activation", [None, "silu"])
def test_numba_equals_reference_forward_and_backward(rows, activation):
    inputs = draw_inputs(2, 37, 5, 4, dtype=torch.float32)
    with use_backend("numba"):
        assert_equals_reference(causal_conv1d, causal_conv1d_ref, inputs, {**rows, "activation": activation})


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 2, 300, 4), (3, 33, 5, 2), (1, 70, 3, 7)])
def test_numba_at_odd_sizes(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = draw_inputs(*shape, dtype=torch.float32, bare=True)
    with use_backend("numba"):
        assert_equals_reference(causal_conv1d, causal_conv1d_ref, inputs, {"reverse": shape[0] == 2})


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
def test_any_number_of_taps(taps, reverse, state):
    options = {"reverse": reverse, "return_state": state}
    with use_backend("torch"):
        assert_equals_reference(causal_conv1d, causal_conv1d_ref, draw_inputs(2, 3, 5, taps, bare=True), options)


@pytest.mark.parametrize("reverse", [False, True])
def test_halves_with_a_carried_state_equal_the_whole(reverse):
    inputs = draw_inputs(2, 20, 3, 4)
    whole, last = causal_conv1d(**inputs, reverse=reverse, return_state=True)
    x, state, parts = inputs.pop("x_BLE"), inputs.pop("initial_state_BEW1"), {}
    for span in [slice(2, 20), slice(0, 2)] if reverse else [slice(0, 2), slice(2, 20)]:
        parts[span.start], state = causal_conv1d(
            x[:, span], **inputs, initial_state_BEW1=state, reverse=reverse, return_state=True
        )
    assert_close(torch.cat([parts[0], parts[2]], dim=1), whole)
    assert_close(state, last)


def test_step_by_step_equals_all_at_once():
    inputs = draw_inputs(2, 9, 3, 4)
    whole, last = causal_conv1d(**inputs, activation="silu", return_state=True)
    state = inputs["initial_state_BEW1"]
    for t in range(9):
        y, state = causal_conv1d_step(
            inputs["x_BLE"][:, t], inputs["w_EW"], inputs["bias_E"], state_BEW1=state, activation="silu"
        )
        assert_close(y, whole[:, t])
    assert_close(state, last)


def test_time_contiguous_input_stays_time_contiguous():
    x = torch.randn(2, 5, 64).transpose(1, 2)
    assert causal_conv1d(x, torch.randn(5, 3)).stride(1) == 1


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="None or 'silu'; got 'relu'"):
        causal_conv1d(torch.randn(1, 4, 2), torch.randn(2, 3), activation="relu")


@pytest.mark.parametrize("name", ["w_EW", "bias_E", "initial_state_BEW1"])
def test_tensors_that_do_not_fit_are_refused(name):
    inputs = {"w_EW": torch.randn(5, 4), "bias_E": torch.randn(5), "initial_state_BEW1": torch.randn(2, 5, 3)}
    inputs[name] = inputs[name][:-1] if name == "w_EW" else inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"{name} must be .* to fit the others"):
        inspect.unwrap(causal_conv1d)(torch.randn(2, 7, 5), **inputs)
