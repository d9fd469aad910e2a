import torch

from genossm.nn.mlp import MLP, NarrowMLP


def test_narrow_mlp_makes_its_hidden_layer_again():
    mlp = MLP(4, 8).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(NarrowMLP.apply(x, *weights), mlp(x))
    assert torch.autograd.gradcheck(NarrowMLP.apply, (x, *weights))
