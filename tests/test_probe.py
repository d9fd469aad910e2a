"""Probes: k-mers are counted right, layers are embedded in the rows' order, linear and neighbours both learn."""

import numpy as np
import pytest
import torch

from genossm.data.examples import Example, Target
from genossm.data.table import Table
from genossm.models.base import config_from_dict
from genossm.probe import fit, kmer_counts, layer_embeddings, probe_kmers, probe_layers


def test_kmers_are_counted():
    counts = kmer_counts([Example("AACN", 0), Example("G", 0)], 2)
    np.testing.assert_allclose(counts[0, :4], [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    two = counts[0, 4:].reshape(4, 4)
    assert (two[0, 0], two[0, 1], two.sum()) == (0.5, 0.5, 1.0)
    assert counts[1].tolist() == [0, 0, 1, 0] + [0] * 16
    with pytest.raises(ValueError, match="k must be 1 to 6"):
        kmer_counts([], 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Table.tiny(tmp_path_factory.mktemp("table")).load()


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return config_from_dict({"model_type": "hyenadna", "d_model": 16, "n_layer": 2, "max_length": 64}).build()


def test_layers_are_in_the_order_of_the_rows(backbone, data):
    rows = data.splits["test"]
    layers = layer_embeddings(backbone, rows, data.target, batch_size=5)
    assert len(layers) == 4
    alone = layer_embeddings(backbone, rows[3:4], data.target)
    for together, one in zip(layers, alone, strict=True):
        np.testing.assert_allclose(together[3], one[0], atol=1e-5)


def test_counting_and_embedding_both_learn_gc(backbone, data):
    found = probe_kmers(data.splits["train"], data.splits["test"], data.target, 2)
    found += probe_layers(backbone, data.splits["train"], data.splits["test"], data.target)
    assert {p.features for p in found} == {"k-mers 1-2", *(f"layer {i}" for i in range(4))}
    assert all(p.metrics["accuracy"] > 0.9 for p in found)


def test_regression_probe_and_mistakes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    y = x @ [1.0, -2.0, 0.5]
    target = Target(kind="regression", names=("y",))
    guess = fit(x[:60], [(v,) for v in y[:60]], x[60:], target)
    assert np.corrcoef(guess[:, 0], y[60:])[0, 1] > 0.99
    with pytest.raises(ValueError, match="probe is one of linear, knn"):
        fit(x, y, x, target, "svm")
    with pytest.raises(ValueError, match="the target is per_base"):
        fit(x, y, x, Target(kind="per_base", names=("a", "b")))
