import torch

from genossm.nn.linear import Linear


def test_linear_has_the_gradients_of_torch():
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (4, 3), (4,))
    )
    torch.testing.assert_close(Linear.apply(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.autograd.gradcheck(Linear.apply, (x, weight, bias))
