"""A model with its head survives the disk: same answers, same names, and its backbone opens alone."""

import pytest
import torch

from genossm import checkpoint
from genossm.models.base import config_from_dict
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig


@pytest.fixture
def classifier():
    backbone = config_from_dict({"model_type": "hyenadna", "d_model": 16, "n_layer": 1, "max_length": 32}).build()
    head = HeadConfig(n_outputs=3, pooling="attention", kind="multiclass", names=("a", "b", "c"))
    return Classifier(backbone, head).eval()


def test_classifier_round_trip(classifier, tmp_path):
    ids, lengths = torch.randint(7, 11, (2, 20)), torch.tensor([20, 13])
    checkpoint.save(classifier, tmp_path / "model")
    again = checkpoint.load_classifier(tmp_path / "model")
    assert torch.equal(again(ids, lengths), classifier(ids, lengths))
    assert again.head.config == classifier.head.config
    alone = checkpoint.load(tmp_path / "model")
    assert torch.equal(alone(ids, lengths), classifier.backbone(ids, lengths))


def test_backbone_alone_has_no_head(classifier, tmp_path):
    checkpoint.save(classifier.backbone, tmp_path / "model")
    with pytest.raises(ValueError, match="without a head"):
        checkpoint.load_classifier(tmp_path / "model")
