import contextlib
import inspect

import pytest
import torch

from genossm.ops.backend import use_backend
from genossm.ops.fftconv import good_size
from genossm.ops.hyena_conv import hyena_conv, hyena_conv_ref
from genossm.testing import assert_close


@pytest.mark.parametrize(
    ("backend", "dtype"), [(None, torch.float32), ("torch", torch.float32), ("torch", torch.float64)]
)
@pytest.mark.parametrize(
    ("batch", "length", "width", "taps"),
    [(1, 1, 1, 3), (2, 2, 3, 3), (3, 37, 5, 3), (1, 129, 7, 4), (2, 3, 2, 3), (2, 70, 11, 3)],
)
def test_equals_reference_forward_and_backward(batch, length, width, taps, dtype, backend, monkeypatch):
    monkeypatch.setattr("genossm.ops.hyena_conv._GROUP", 1 << 10)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    truths = {
        "u_BLC": draw(batch, 3 * width, length).transpose(1, 2),
        "w_CW": draw(3 * width, taps),
        "bias_C": draw(3 * width),
        "k_DL": draw(width, length + 2) / length**0.5,
        "skip_D": draw(width),
    }
    given = {name: value.to(dtype).requires_grad_() for name, value in truths.items()}
    truths = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    with use_backend(backend) if backend else contextlib.nullcontext():
        fast = hyena_conv(**given)
    truth = hyena_conv_ref(**truths)
    assert_close(fast, truth)
    weight = torch.randn_like(truth)
    grads = torch.autograd.grad(fast, list(given.values()), weight.to(dtype))
    for name, got, want in zip(given, grads, torch.autograd.grad(truth, list(truths.values()), weight), strict=True):
        assert_close(got, want, f"gradient of {name}")


def test_threads_share_the_rows(monkeypatch):
    def draw(*shape):
        return torch.randn(*shape, requires_grad=True)

    given = [draw(2, 50, 15), draw(15, 3), draw(15), draw(5, 50), draw(5)]
    alone = torch.autograd.grad(hyena_conv(*given).square().sum(), given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(alone, torch.autograd.grad(hyena_conv(*given).square().sum(), given), strict=True):
        assert torch.equal(one, other)


def test_short_filter_is_refused():
    with pytest.raises(ValueError, match="4 taps, the sequence 5"):
        hyena_conv(torch.randn(1, 5, 6), torch.randn(6, 3), torch.randn(6), torch.randn(2, 4), torch.randn(2))


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_a_transform_that_was_kept_is_the_filter(backend):
    u_BLC, w_CW, bias_C, k_DL, skip_D = (torch.randn(*shape) for shape in ((2, 50, 15), (15, 3), (15,), (5, 50), (5,)))
    given = u_BLC.transpose(1, 2).contiguous().transpose(1, 2), w_CW, bias_C
    k_DF = torch.fft.rfft(k_DL, n=good_size(99))
    with use_backend(backend) if backend else contextlib.nullcontext():
        kept = hyena_conv(*given, k_DF, skip_D)
    assert_close(kept, hyena_conv_ref(*given, k_DL, skip_D))
    with pytest.raises(ValueError, match="has 40 frequencies; a sequence of 50 takes 61"):
        hyena_conv(*given, k_DF[:, :40], skip_D)


@pytest.mark.parametrize("place", range(5))
def test_tensors_that_do_not_fit_are_refused(place):
    shapes = [(1, 5, 6), (6, 3), (6,), (2, 5), (2,)]
    shapes[place] = (1, 5, 9) if place == 0 else (shapes[place][0] + 1, *shapes[place][1:])
    with pytest.raises(ValueError, match="to fit the others"):
        inspect.unwrap(hyena_conv)(*(torch.randn(shape) for shape in shapes))
