"""Metrics are of the whole split and agree with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from genossm.data.examples import Target
from genossm.tasks.metrics import SplitMetrics, bootstrap, default_metric, evaluate_outputs, matthews, mode_of


def draw(classes, rows=301):
    rng = np.random.default_rng(0)
    targets = rng.integers(classes, size=rows)
    logits = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[targets]
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(targets)


@pytest.mark.parametrize("classes", [2, 4])
def test_choice_metrics_agree_with_scikit_learn(classes):
    target = Target(kind="binary" if classes == 2 else "multiclass", names=tuple("abcd"[:classes]))
    logits, truth = draw(classes)
    split = SplitMetrics(target)
    for rows in torch.arange(301).split(64):
        split.update(logits[rows], truth[rows])
    got = {name: float(value) for name, value in split.compute().items()}
    p, y, guess = logits.softmax(-1).numpy(), truth.numpy(), logits.argmax(-1).numpy()
    onehot = np.eye(classes)[y]
    wanted = {
        "accuracy": sk.accuracy_score(y, guess),
        "mcc": sk.matthews_corrcoef(y, guess),
        "f1_macro": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p[:, 1]) if classes == 2 else sk.roc_auc_score(y, p, multi_class="ovr"),
        "auprc": sk.average_precision_score(y, p[:, 1]) if classes == 2 else sk.average_precision_score(onehot, p),
    }
    if classes == 2:
        wanted["f1_binary"] = sk.f1_score(y, guess)
    assert got == pytest.approx(wanted, abs=1e-5)


def test_multilabel_and_regression_metrics():
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=(200, 3)).astype(np.float32)
    logits = torch.tensor(rng.normal(size=(200, 3)) + truth, dtype=torch.float32)
    target = Target(kind="multilabel", names=("a", "b", "c"))
    got = evaluate_outputs(target, logits, torch.tensor(truth))
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(truth, logits.numpy()), abs=1e-5)
    assert got["auprc"] == pytest.approx(sk.average_precision_score(truth, logits.numpy()), abs=1e-5)
    values = torch.tensor(rng.normal(size=(200, 1)), dtype=torch.float32)
    guess = values + 0.3 * torch.randn(200, 1)
    got = evaluate_outputs(Target(kind="regression", names=("y",)), guess, values)
    assert got["pearson"] == pytest.approx(np.corrcoef(guess[:, 0], values[:, 0])[0, 1], abs=1e-4)
    assert got["r2"] == pytest.approx(sk.r2_score(values, guess), abs=1e-4)


def test_bootstrap_interval_holds_the_value_and_narrows():
    target = Target(kind="multiclass", names=tuple("abcd"))
    logits, truth = draw(4, 400)
    for metric in ("accuracy", "mcc", "f1_macro"):
        value = evaluate_outputs(target, logits, truth)[metric]
        low, high = bootstrap(target, logits, truth, metric, draws=60)
        assert low < value < high
    wide = np.subtract(*bootstrap(target, logits[:50], truth[:50], "accuracy"))
    assert abs(wide) > abs(np.subtract(*bootstrap(target, logits, truth, "accuracy")))
    with pytest.raises(KeyError, match="no metric 'pearson'"):
        bootstrap(target, logits, truth, "pearson")


def test_matthews_of_a_table():
    logits, truth = draw(4)
    guess = logits.argmax(-1)
    assert matthews(sk.confusion_matrix(truth, guess)) == pytest.approx(sk.matthews_corrcoef(truth, guess))
    assert matthews(np.array([[5, 0], [3, 0]])) == 0.0


def test_which_way_is_better():
    assert [mode_of(m) for m in ("val/loss", "val/accuracy", "val/mse")] == ["min", "max", "min"]
    assert [default_metric(k) for k in ("binary", "multilabel", "tracks")] == ["accuracy", "auprc", "pearson"]
