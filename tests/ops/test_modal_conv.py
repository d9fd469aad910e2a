"""The modal convolution: equal to its recurrence, forward, backward and in pieces."""

import pytest
import torch

from genossm.ops.modal_conv import modal_conv, modal_conv_ref, modal_filter
from genossm.testing import assert_close


def draw(length, channels=3, modes=4):
    p = torch.polar(torch.rand(channels, modes) * 0.99, torch.rand(channels, modes) * 6)
    p[0, 0] = 0
    r = torch.randn(channels, modes, dtype=torch.complex64)
    return torch.randn(2, length, channels), p, r, torch.randn(channels)


@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_convolution_equals_the_recurrence(length):
    x, p, r, skip = draw(length)
    state = torch.randn(2, 3, 4, dtype=torch.complex64)
    for initial in (None, state):
        y, after = modal_conv(x, p, r, skip, initial, return_state=True)
        expected, expected_after = modal_conv_ref(x, p, r, skip, initial, return_state=True)
        assert_close(y, expected, "y")
        assert_close(torch.view_as_real(after), torch.view_as_real(expected_after), "state")


def test_gradients_equal_those_of_the_recurrence():
    x, p, r, skip = draw(41)
    leaves = [t.requires_grad_() for t in (x, torch.view_as_real(p).clone(), torch.view_as_real(r).clone(), skip)]

    def loss(op):
        p_DM, r_DM = torch.view_as_complex(leaves[1]), torch.view_as_complex(leaves[2])
        return op(leaves[0], p_DM, r_DM, leaves[3]).square().sum()

    fast, slow = (torch.autograd.grad(loss(op), leaves) for op in (modal_conv, modal_conv_ref))
    # A pole of zero is taken for a tiny one: its own gradient means nothing.
    fast[1][0, 0] = slow[1][0, 0] = 0
    for name, one, other in zip(("x", "poles", "residues", "skip"), fast, slow, strict=True):
        assert_close(one, other, name)


def test_a_filter_starts_with_the_sum_of_its_residues():
    _, p, r, _ = draw(4)
    torch.testing.assert_close(modal_filter(p, r, 4)[:, 0], r.real.sum(1))
    torch.testing.assert_close(modal_filter(p, r, 3, first=1), modal_filter(p, r, 4)[:, 1:])
