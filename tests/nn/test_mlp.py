import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from genossm.nn.mlp import MLP, NarrowMLP
from genossm.ops import kept


def test_narrow_mlp_makes_its_hidden_layer_again():
    mlp = MLP(4, 8).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(NarrowMLP.apply(x, *weights), mlp(x))
    assert torch.autograd.gradcheck(NarrowMLP.apply, (x, *weights))


@pytest.mark.parametrize("marked", [True, False], ids=["last", "read"])
def test_narrow_mlp_made_again_leaves_out_what_nothing_reads_and_nothing_else(marked):
    mlp = MLP(4, 8)
    weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    made = []

    def layer(x):
        with kept.last_step() if marked else contextlib.nullcontext():
            y = NarrowMLP.apply(x.sin(), *weights)
        made.append(y.detach())
        # What is marked as the last step is followed by sums alone.
        return x + y if marked else y.exp()

    x = torch.randn(2, 5, 4, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), (x, *weights))
    with set_checkpoint_early_stop(False):
        ran = checkpoint(layer, x, use_reentrant=False, context_fn=kept.region)
    for got, wanted in zip(torch.autograd.grad(ran.sum(), (x, *weights)), plain, strict=True):
        assert torch.equal(got, wanted)
    assert bool(made[-1].isnan().all()) == marked
