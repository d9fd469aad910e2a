import torch

from genossm.nn.mamba import BiMamba, GatedMLP, MambaShape, RMSNormGated


def test_directions_see_both_sides_and_padding_is_not_seen():
    mixer = BiMamba(MambaShape(d_model=8, d_state=4), tied=True)
    x = torch.randn(2, 12, 8)
    padded = mixer(x, torch.tensor([12, 5]))
    torch.testing.assert_close(padded[1:, :5], mixer(x[1:, :5]), atol=1e-5, rtol=1e-5)


def test_reading_backwards_equals_turning_the_input():
    for strategy in ("add", "ew_multiply"):
        for tied in (True, False):
            mixer = BiMamba(MambaShape(d_model=8, d_state=4, bias=True), strategy, tied)
            x = torch.randn(2, 12, 8)
            torch.testing.assert_close(mixer(x, mirrored=True), mixer(x.flip(1, 2)).flip(1, 2), atol=1e-5, rtol=1e-5)


def test_gated_norm_is_by_group():
    y, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    normed = RMSNormGated(8, 2, 0.0)(y, z).unflatten(-1, (2, 4))
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, 3, 2))
    before = RMSNormGated(8, 1, 0.0, norm_before_gate=True)(y, z) / torch.nn.functional.silu(z)
    torch.testing.assert_close(before.square().mean(-1), torch.ones(2, 3))


def test_gated_mlp_is_rounded_up():
    assert GatedMLP(8, 20).fc1.weight.shape == (256, 8)
