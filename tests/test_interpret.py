import pytest
import torch

from genossm.interpret import OneHotAdapter
from genossm.models.base import model_types
from genossm.models.classifier import Classifier
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.nn.head import HeadConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = HyenaDNAConfig(d_model=16, n_layer=1, max_length=64).build()
    return Classifier(backbone, HeadConfig(n_outputs=2)).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(7, 11, (2, 20), generator=torch.Generator().manual_seed(1))


def onehot(ids):
    return torch.nn.functional.one_hot(ids - 7, 4).transpose(1, 2).float()


def test_one_hot_gives_what_ids_give(model, ids):
    torch.testing.assert_close(OneHotAdapter(model)(onehot(ids)), model(ids))
    torch.testing.assert_close(OneHotAdapter(model.backbone)(onehot(ids)), model.backbone(ids).mean(1))


@pytest.mark.parametrize("kind", ["mamba", "caduceus"])
def test_other_backbones(kind, ids):
    if kind not in model_types():
        pytest.skip(f"there is no {kind} yet")
    torch.manual_seed(0)
    backbone = model_types()[kind](d_model=16, n_layer=1).build().eval()
    torch.testing.assert_close(OneHotAdapter(backbone)(onehot(ids)), backbone(ids).mean(1), atol=1e-5, rtol=1e-5)


def test_other_input_is_refused(model, ids):
    with pytest.raises(ValueError, match=r"\(batch, 4, length\)"):
        OneHotAdapter(model)(onehot(ids).transpose(1, 2))


def test_captum_runs_unchanged(model, ids):
    attr = pytest.importorskip("captum.attr")
    x = onehot(ids).requires_grad_()
    found, left = attr.IntegratedGradients(OneHotAdapter(model)).attribute(
        x, target=1, n_steps=64, return_convergence_delta=True
    )
    assert found.shape == x.shape
    assert float(left.detach().abs().max()) < 1e-2


@pytest.mark.filterwarnings("ignore")
def test_tangermeme_runs_unchanged(model, ids):
    saturation = pytest.importorskip("tangermeme.saturation_mutagenesis")
    adapter = OneHotAdapter(model)
    whole, each = saturation.saturation_mutagenesis(adapter, onehot(ids), raw_outputs=True, device="cpu", verbose=False)
    torch.testing.assert_close(whole, adapter(onehot(ids)), atol=1e-5, rtol=1e-5)
    changed = ids.clone()
    changed[0, 5] = 9
    torch.testing.assert_close(each[0, 2, 5], model(changed)[0], atol=1e-5, rtol=1e-5)
