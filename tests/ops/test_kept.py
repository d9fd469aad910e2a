import torch
from torch.utils.checkpoint import checkpoint

from genossm.ops import kept


def test_a_region_hands_out_what_it_kept_each_time_it_is_made_again():
    made = []

    def doubled(x):
        if kept.remaking():
            (held,) = kept.kept()
        else:
            held = 2 * x.detach()
            made.append(held)
            kept.keep(held)
        return held * x

    x = torch.tensor(3.0, requires_grad=True)
    y = checkpoint(lambda x: doubled(doubled(x)), x, use_reentrant=False, context_fn=kept.region)
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.autograd.grad(y, x) == first
    assert len(made) == 2
    assert not kept.inside()


def test_outside_of_a_region_nothing_is_kept():
    kept.keep(torch.ones(1))
    assert not kept.inside()
    assert not kept.remaking()
