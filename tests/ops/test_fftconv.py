import pytest
import torch

from genossm.ops.fftconv import fftconv, fftconv_ref, good_size


@pytest.mark.parametrize("reverse", [False, True], ids=["causal", "both-ways"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (2, 37, 5), (3, 64, 2), (1, 129, 7)])
def test_equals_reference_forward_and_backward(batch, length, width, gated, reverse):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = {"x_BLD": draw(batch, length, width), "k_DL": draw(width, length + 3), "skip_D": draw(width)}
    if reverse:
        inputs["k_reverse_DL"] = draw(width, length)
    if gated:
        inputs |= {"gate_in_BLD": draw(batch, length, width), "gate_out_BLD": draw(batch, length, width)}
    fast, truth = fftconv(**inputs), fftconv_ref(**inputs)
    torch.testing.assert_close(fast, truth)
    weight = torch.randn_like(truth)
    grads = torch.autograd.grad(fast, list(inputs.values()), weight)
    for name, got, want in zip(inputs, grads, torch.autograd.grad(truth, list(inputs.values()), weight), strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_short_filter_is_refused():
    with pytest.raises(ValueError, match="4 taps, the sequence 5"):
        fftconv(torch.randn(1, 5, 2), torch.randn(2, 4))


@pytest.mark.parametrize("n", [1, 7, 1025, 16387, 320003, 2000003])
def test_good_size_is_smooth_and_near(n):
    size = good_size(n)
    assert n <= size <= 1.26 * n + 1
    while size % 2 == 0:
        size //= 2
    assert size in (1, 3, 5, 9, 15)
