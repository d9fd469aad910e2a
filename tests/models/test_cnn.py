import pytest
import torch

from genossm.models.cnn import CNNConfig


@pytest.mark.parametrize("causal", [True, False])
def test_sees_as_far_as_it_says(causal):
    config = CNNConfig(d_model=8, n_layer=3, kernel_size=3, dilation_cycle=2, causal=causal)
    assert config.dilations == (1, 2, 1)
    assert config.receptive_field == 9
    model = config.build().double().eval()
    ids = torch.randint(7, 11, (1, 41))
    x = model.embed(ids).detach().requires_grad_()
    model.run_layers(x)[0, 20].sum().backward()
    reached = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert reached == (list(range(12, 21)) if causal else list(range(16, 25)))


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd; got 4"):
        CNNConfig(kernel_size=4)
