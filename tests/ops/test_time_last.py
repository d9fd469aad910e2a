import torch

from genossm.ops.time_last import FromTime, ToTime


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_to_time_is_a_linear_layer_turned():
    x, weight, bias = draw(2, 5, 3), draw(4, 3), draw(4)
    wanted = torch.nn.functional.linear(x, weight, bias).transpose(1, 2)
    torch.testing.assert_close(ToTime.apply(x, weight, bias), wanted)
    assert torch.autograd.gradcheck(ToTime.apply, (x, weight, bias))


def test_from_time_turns_back():
    x, weight, bias = draw(2, 3, 5), draw(4, 3), draw(4)
    wanted = torch.nn.functional.linear(x.transpose(1, 2), weight, bias)
    torch.testing.assert_close(FromTime.apply(x, weight, bias), wanted)
    assert torch.autograd.gradcheck(FromTime.apply, (x, weight, bias))
