import inspect

import pytest
import torch

from genossm.ops.backend import use_backend
from genossm.ops.ssd import ssd, ssd_ref, ssd_step
from genossm.testing import assert_close, assert_equals_reference


def draw_inputs(batch, length, heads, headdim, groups, states, dtype=torch.float64, bare=False, wide_skip=False):
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "x_BLHP": (batch, length, heads, headdim),
        "dt_BLH": (batch, length, heads),
        "A_H": (heads,),
        "B_BLGN": (batch, length, groups, states),
        "C_BLGN": (batch, length, groups, states),
    }
    if not bare:
        shapes |= {
            "D": (heads, headdim) if wide_skip else (heads,),
            "z_BLHP": (batch, length, heads, headdim),
            "dt_bias_H": (heads,),
            "initial_state_BHPN": (batch, heads, headdim, states),
        }
    drawn = {name: torch.randn(*shape, dtype=torch.float64, generator=gen) for name, shape in shapes.items()}
    drawn["A_H"] = -drawn["A_H"].exp()
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def test_numba_equals_reference_forward_and_backward(rows):
    with use_backend("numba"):
        assert_equals_reference(ssd, ssd_ref, draw_inputs(2, 37, 4, 3, 2, 5, dtype=torch.float32), rows)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("headdim", [3, 100, 300])
def test_numba_over_several_chunks_and_blocks(reverse, headdim):
    options = {"reverse": reverse, "return_state": True, "resets_BL": torch.rand(2, 150) < 0.03}
    options["lengths_B"] = torch.tensor([150, 90])
    with use_backend("numba"):
        inputs = draw_inputs(2, 150, 3, headdim, 1, 2, dtype=torch.float32, wide_skip=True)
        assert_equals_reference(ssd, ssd_ref, inputs, options)


def test_numba_on_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with use_backend("numba"):
        assert_equals_reference(ssd, ssd_ref, draw_inputs(3, 70, 4, 3, 2, 5, dtype=torch.float32), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numba_takes_half_precision(dtype):
    with use_backend("numba"):
        y = ssd(**draw_inputs(1, 20, 2, 3, 1, 2, dtype=dtype, bare=True))
    assert y.dtype == dtype
    assert_close(y, ssd_ref(**draw_inputs(1, 20, 2, 3, 1, 2, dtype=dtype, bare=True)))


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_steps_that_overflow_half_precision_decay_to_zero(name):
    inputs = draw_inputs(1, 5, 2, 3, 1, 2, dtype=torch.float16, bare=True)
    inputs["dt_BLH"][:, 2] = 60_000
    inputs["x_BLHP"][:, 2] = 0
    with use_backend(name):
        y = ssd(**inputs)
        after = ssd(**{key: tensor[:, 3:] if "L" in key else tensor for key, tensor in inputs.items()})
    assert y.isfinite().all()
    assert_close(y[:, 3:], after)


def test_documents_are_apart_bit_by_bit():
    inputs = draw_inputs(1, 40, 2, 3, 1, 4, dtype=torch.float32, bare=True)
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, 25] = True
    other = {name: tensor.clone() for name, tensor in inputs.items()}
    other["x_BLHP"][:, :25] *= 100
    with use_backend("numba"):
        assert torch.equal(ssd(**inputs, resets_BL=resets)[:, 25:], ssd(**other, resets_BL=resets)[:, 25:])


def test_no_position_is_refused():
    with pytest.raises(ValueError, match="length 0"):
        ssd(**draw_inputs(1, 0, 2, 3, 1, 2))


def test_torch_equals_reference_forward_and_backward(rows):
    with use_backend("torch"):
        assert_equals_reference(ssd, ssd_ref, draw_inputs(2, 37, 4, 3, 2, 5), rows)


@pytest.mark.parametrize("reverse", [False, True])
def test_torch_over_several_chunks(reverse):
    options = {"reverse": reverse, "return_state": True, "resets_BL": torch.rand(2, 150) < 0.03}
    options["lengths_B"] = torch.tensor([150, 90])
    with use_backend("torch"):
        assert_equals_reference(ssd, ssd_ref, draw_inputs(2, 150, 2, 3, 1, 2, wide_skip=True), options)


@pytest.mark.parametrize("softplus", [True, False])
def test_torch_without_options(softplus):
    inputs = draw_inputs(1, 65, 2, 3, 1, 2, bare=True)
    inputs["dt_BLH"] = inputs["dt_BLH"].abs()
    with use_backend("torch"):
        assert_equals_reference(ssd, ssd_ref, inputs, {"dt_softplus": softplus})


def test_float32_stays_close_where_decays_underflow():
    inputs = draw_inputs(1, 300, 2, 3, 1, 2, dtype=torch.float32)
    inputs["dt_BLH"] = inputs["dt_BLH"] + 4
    with use_backend("torch"):
        assert_equals_reference(ssd, ssd_ref, inputs, {})


def test_step_by_step_equals_all_at_once():
    inputs = draw_inputs(2, 9, 4, 3, 2, 5)
    whole, last = ssd(**inputs, return_state=True)
    state = inputs.pop("initial_state_BHPN")
    for t in range(9):
        at = {name.replace("L", ""): v[:, t] if "L" in name else v for name, v in inputs.items()}
        y, state = ssd_step(**at, state_BHPN=state)
        assert_close(y, whole[:, t])
    assert_close(state, last)


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="3 groups of B and C must divide the 4 heads"):
        ssd(**draw_inputs(1, 5, 4, 2, 3, 2))


@pytest.mark.parametrize("name", ["dt_BLH", "A_H", "C_BLGN", "D", "z_BLHP", "dt_bias_H", "initial_state_BHPN"])
def test_tensors_that_do_not_fit_are_refused(name):
    inputs = draw_inputs(2, 7, 4, 3, 2, 5)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=f"{name} must be .* to fit the others"):
        inspect.unwrap(ssd)(**inputs)
