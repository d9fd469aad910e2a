import torch

from genossm.nn.mlp import GeluLinear


def test_gelu_linear_makes_its_hidden_layer_again():
    h, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 8), (3, 8), (3,))
    )
    wanted = torch.nn.functional.linear(torch.nn.functional.gelu(h, approximate="tanh"), weight, bias)
    torch.testing.assert_close(GeluLinear.apply(h, weight, bias), wanted)
    assert torch.autograd.gradcheck(GeluLinear.apply, (h, weight, bias))
