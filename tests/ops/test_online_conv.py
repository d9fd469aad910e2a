import pytest
import torch

from genossm.ops import online_conv as module
from genossm.ops.online_conv import Taps, online_conv, online_conv_ref, online_conv_state


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "LEAST", 16)


def draw(batch, length, width):
    x = torch.randn(batch, length, width, dtype=torch.float64)
    return x, torch.randn(width, length + 3, dtype=torch.float64)


def run(x, taps, state, pieces):
    outputs = []
    for piece in x.split(pieces, dim=1):
        y, state = online_conv(piece, taps, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    "pieces", [[1] * 90, [40, *[1] * 50], [1, 5, 1, 1, 30, *[1] * 52], [90], [64, *[1] * 26]], ids=str
)
def test_any_pieces_give_what_all_at_once_gives(pieces):
    x, k = draw(2, 90, 3)
    y, state = run(x, Taps(k), online_conv_state(2, 3, x), pieces)
    torch.testing.assert_close(y, online_conv_ref(x, k))
    assert state["length"] == 90


def test_a_state_can_be_gone_on_from_twice():
    x, k = draw(1, 60, 2)
    other = torch.cat([x[:, :25], torch.randn_like(x[:, 25:])], 1)
    taps = Taps(k)
    _, state = run(x[:, :25], taps, online_conv_state(1, 2, x), [1] * 25)
    for branch in (x, other, x):
        y, _ = run(branch[:, 25:], taps, state, [1] * 35)
        torch.testing.assert_close(y, online_conv_ref(branch, k)[:, 25:])


def test_work_of_a_step_does_not_grow_with_the_past(monkeypatch):
    elements = []
    rfft = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n=None: elements.append(n) or rfft(x, n=n))

    def mean_work(length):
        elements.clear()
        x, k = draw(1, length, 1)
        run(x, Taps(k), online_conv_state(1, 1, x), [length // 2, *[1] * (length // 2)])
        return module.BLOCK + sum(elements) / (length // 2)

    assert mean_work(1024) < 2 * mean_work(128)


def test_filter_that_ends_is_refused():
    x, k = draw(1, 8, 1)
    with pytest.raises(ValueError, match="8 taps; position 9"):
        run(torch.cat([x, x[:, :1]], 1), Taps(k[:, :8]), online_conv_state(1, 1, x), [8, 1])
