import torch

from genossm.models.hyenadna import HyenaDNAConfig


def test_both_ways_sees_its_neighbours_and_everything_else():
    """The published `bidirectional` sees only what lies at least half the sequence away."""
    model = HyenaDNAConfig(d_model=8, n_layer=1, max_length=64, bidirectional=True).build().double().eval()
    x = model.embed(torch.randint(7, 11, (1, 48))).detach().requires_grad_()
    for t in (0, 1, 24, 47):
        (gradient,) = torch.autograd.grad(model.run_layers(x)[0, t].square().sum(), x)
        assert (gradient[0].abs().sum(-1) > 1e-12).all()
