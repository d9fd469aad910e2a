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
