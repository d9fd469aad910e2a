import pytest
import torch

from genossm.models.base import config_from_dict
from genossm.models.equivariant import EquivariantConfig


def test_a_trained_model_inside_is_conjoined_after_the_fact():
    wrapped = EquivariantConfig(backbone={"model_type": "transformer", "d_model": 8, "n_head": 2}).build().eval()
    ids = torch.randint(7, 11, (2, 9))
    inside = wrapped.backbone
    complement = wrapped.complement_V
    other = complement[ids.flip(1)]
    mean = (inside.logits(inside(ids)) + inside.logits(inside(other)).flip(1)[..., complement]) / 2
    torch.testing.assert_close(wrapped.logits(wrapped(ids)), mean)


def test_width_and_depth_are_those_of_the_backbone():
    config = EquivariantConfig(backbone={"model_type": "cnn", "d_model": 8, "n_layer": 3})
    assert (config.d_model, config.n_layer) == (8, 3)
    assert config_from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="d_model is that of the backbone inside, 8; got 16"):
        EquivariantConfig(backbone={"model_type": "cnn", "d_model": 8, "n_layer": 3}, d_model=16)


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="No backbone has model_type='gnn'"):
        EquivariantConfig(backbone={"model_type": "gnn"})
