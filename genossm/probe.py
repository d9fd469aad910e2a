"""What a linear model or neighbours make of frozen embeddings, layer by layer, beside counting k-mers."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genossm.data.examples import Example, Target
from genossm.data.sequences import Encoded, SequenceBatches
from genossm.dna import alphabet
from genossm.dna.tokenizer import tokenizer_named
from genossm.models.base import Backbone
from genossm.nn.head import pool
from genossm.tasks.metrics import evaluate_outputs

Features = npt.NDArray[np.floating]
METHODS = ("linear", "knn")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe measured: `features` are "k-mers 1-5" or "layer 3", `method` one of `METHODS`."""

    features: str
    method: str
    metrics: dict[str, float]


def kmer_counts(rows: Sequence[Example], longest: int = 5) -> npt.NDArray[np.float32]:
    """Return the share of each k-mer, k = 1..`longest`, among those of its length; k-mers with an N don't count.

    Raises:
        ValueError: `longest` is not in 1..6.
    """
    if not 1 <= longest <= 6:
        raise ValueError(f"k must be 1 to 6; got {longest}.")
    counts = np.zeros((len(rows), sum(4**k for k in range(1, longest + 1))), np.float32)
    for number, row in enumerate(rows):
        base = (alphabet.from_text(row.sequence) & np.uint8(0x7F)).astype(np.int64) - alphabet.A
        code, whole, first = np.zeros_like(base), np.ones(len(base), bool), 0
        for k in range(1, longest + 1):
            size = len(base) - k + 1
            if size < 1:
                break
            code = code[:size] * 4 + base[k - 1 :]
            whole = whole[:size] & (base[k - 1 :] < 4)
            counted = np.bincount(code[whole], minlength=4**k)
            counts[number, first : first + 4**k] = counted / max(1, counted.sum())
            first += 4**k
    return counts


@torch.no_grad()
def layer_embeddings(
    backbone: Backbone, rows: Sequence[Example], target: Target, pooling: str = "mean", batch_size: int = 32
) -> list[npt.NDArray[np.float32]]:
    """Return one pooled vector a row for the embedding (0), each block's output and, last, the final norm's.

    Args:
        backbone: stays as it is, in evaluation mode.
        rows: labelled sequences.
        target: what they are labelled with.
        pooling: see `genossm.nn.head.pool`.
        batch_size: rows at a time.
    """
    tokenizer = tokenizer_named(backbone.config.tokenizer)
    longest = None if backbone.max_length is None else backbone.max_length * tokenizer.bases_per_token
    batches = SequenceBatches(Encoded(rows, target, longest), tokenizer, batch_size, None)
    device = next(backbone.parameters()).device
    backbone.eval()
    found: list[list[Tensor]] = []
    for number in range(len(batches)):
        batch = batches[number]
        ids_BL, lengths_B = batch["ids_BL"].to(device), batch.get("lengths_B")
        lengths_B = None if lengths_B is None else lengths_B.to(device)
        seen: list[Tensor] = [backbone.embed(ids_BL)]

        def visit(index: int, x_BLD: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(x_BLD)

        seen.append(backbone.norm_f(backbone.run_layers(seen[0], lengths_B, visit=visit)))
        found.append([pool(x_BLD, pooling, lengths_B).float().cpu() for x_BLD in seen])
    order = np.concatenate([batches.numbers(i) for i in range(len(batches))])
    back = np.argsort(order)
    return [torch.cat(layer).numpy()[back] for layer in zip(*found, strict=True)]


def fit(
    train: Features, train_targets: Sequence[Any], test: Features, target: Target, method: str = "linear"
) -> npt.NDArray[np.float64]:
    """Fit a probe on train features and return its outputs on test: log-probabilities (M, C) or values (M, C).

    Args:
        train, test: features, standardised by those of train.
        train_targets: class indices, or tuples of values.
        target: what is predicted: classes or values, one a row.
        method: "linear" (logistic or ridge regression) or "knn" (5 neighbours).

    Raises:
        ValueError: an unknown method, or a kind of target that probes don't take.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.preprocessing import StandardScaler

    if method not in METHODS:
        raise ValueError(f"A probe is one of {', '.join(METHODS)}; got {method!r}.")
    if target.kind not in ("binary", "multiclass", "regression"):
        raise ValueError(f"A probe predicts a class or values of a sequence; the target is {target.kind}.")
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    if target.kind == "regression":
        model: Any = RidgeCV(np.logspace(-2, 4, 7)) if method == "linear" else KNeighborsRegressor(5)
        return model.fit(train, np.array(train_targets)).predict(test).reshape(len(test), -1)
    # C that suits some hundred to a few thousand features on a common scale.
    model = LogisticRegression(C=0.01, max_iter=300) if method == "linear" else KNeighborsClassifier(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, np.array(train_targets))
    chances = np.full((len(test), len(target.names)), 1e-9)
    chances[:, model.classes_] = np.maximum(model.predict_proba(test), 1e-9)
    return np.log(chances)


def probe_kmers(
    train: Sequence[Example],
    test: Sequence[Example],
    target: Target,
    longest: int = 5,
    methods: Sequence[str] = METHODS,
) -> list[Probe]:
    """Measure what counting k-mers gives: the line that a model has to beat."""
    counts = [kmer_counts(rows, longest) for rows in (train, test)]
    return [_measure(f"k-mers 1-{longest}", counts, train, test, target, method) for method in methods]


def probe_layers(
    backbone: Backbone,
    train: Sequence[Example],
    test: Sequence[Example],
    target: Target,
    pooling: str = "mean",
    methods: Sequence[str] = METHODS,
) -> list[Probe]:
    """Measure what each layer's frozen embedding gives; layer 0 is the embedding, the last one the final norm."""
    layers = [layer_embeddings(backbone, rows, target, pooling) for rows in (train, test)]
    return [
        _measure(f"layer {number}", list(pair), train, test, target, method)
        for number, pair in enumerate(zip(*layers, strict=True))
        for method in methods
    ]


def _measure(
    name: str,
    features: Sequence[Features],
    train: Sequence[Example],
    test: Sequence[Example],
    target: Target,
    method: str,
) -> Probe:
    outputs = torch.from_numpy(fit(features[0], [r.target for r in train], features[1], target, method)).float()
    truth = torch.tensor([r.target for r in test])
    return Probe(features=name, method=method, metrics=evaluate_outputs(target, outputs, truth))
