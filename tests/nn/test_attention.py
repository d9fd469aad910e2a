import math

import pytest
import torch

from genossm.nn.attention import Attention, Rotary, attend, attend_documents, attend_ref


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("length", "known"), [(1, 1), (7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_reference_forward_and_backward(groups, length, known, masked, causal):
    def draw(positions, heads):
        return torch.randn(2, positions, heads, 4, dtype=torch.float64, requires_grad=True)

    inputs = [draw(length, 6), draw(known, groups), draw(known, groups)]
    mask = torch.arange(known) < torch.tensor([[known], [known - length + 1]]) if masked else None
    fast, truth = (op(*inputs, mask, causal) for op in (attend, attend_ref))
    torch.testing.assert_close(fast, truth)
    weight = torch.randn_like(truth)
    for name, got, want in zip(
        "qkv", torch.autograd.grad(fast, inputs, weight), torch.autograd.grad(truth, inputs, weight), strict=True
    ):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_documents_equal_the_reference_run_on_each():
    q, k, v = (torch.randn(2, 11, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    resets = torch.zeros(2, 11, dtype=torch.bool)
    resets[0, [3, 4]] = resets[1, 0] = True
    fast = attend_documents(q, k, v, resets)
    truth = torch.zeros_like(fast)
    for row, first, last in ((0, 0, 3), (0, 3, 4), (0, 4, 11), (1, 0, 11)):
        truth[row, first:last] = attend_ref(*(x[row : row + 1, first:last] for x in (q, k, v)))[0]
    torch.testing.assert_close(fast, truth)
    weight = torch.randn_like(truth)
    for got, want in zip(*(torch.autograd.grad(y, [q, k, v], weight) for y in (fast, truth)), strict=True):
        torch.testing.assert_close(got, want)


def test_rotary_is_the_complex_turn_of_the_paper():
    rotary = Rotary(8, base=100.0, scaling=2.0)
    q, k = torch.randn(2, 1, 5, 1, 8).unbind()
    turned, _ = rotary(q, k, start=3)
    for t in range(5):
        for p in range(4):
            angle = (3 + t) / 2.0 * 100.0 ** (-2 * p / 8)
            want = torch.complex(q[0, t, 0, p], q[0, t, 0, p + 4]) * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(torch.complex(turned[0, t, 0, p], turned[0, t, 0, p + 4]), want)


def test_rotary_knows_only_distances():
    rotary = Rotary(16)
    q, k = torch.randn(2, 1, 1, 1, 16).unbind()

    def product(at, other):
        return (rotary(q, k, at)[0] * rotary(q, k, other)[1]).sum()

    torch.testing.assert_close(product(3, 10), product(1_000_003, 1_000_010), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(product(3, 10), product(3, 11), atol=1e-3)


def test_a_cache_may_be_continued_twice():
    attention = Attention(16, 4, n_kv_head=2, rotary=Rotary(4))
    x = torch.randn(2, 9, 16)
    _, state = attention.extend(x[:, :4], attention.init_state(2))
    other, _ = attention.extend(torch.randn(2, 3, 16), state)
    ours, _ = attention.extend(x[:, 4:], state)
    torch.testing.assert_close(ours, attention(x)[:, 4:])
    assert not torch.allclose(other, ours[:, :3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": 3}, "d_model must be a multiple of n_head; got d_model=16, n_head=3"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head must be a multiple of n_kv_head"),
        ({"n_head": 4, "n_kv_head": 0}, "n_head must be a multiple of n_kv_head"),
    ],
)
def test_impossible_heads_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, **values)


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="even width; got 5"):
        Rotary(5)
