"""Checkpoints in published layouts that were never files: random weights, every one of which matters."""

from pathlib import Path

import torch

from genossm import published, source
from genossm.models.classifier import Classifier


class InMemory(source.Source):
    """A source whose files were never written."""

    def __init__(self, config, tensors):
        super().__init__("memory", None, Path())
        object.__setattr__(self, "_content", (config, tensors))

    def read_config(self):
        return self._content[0]

    def read_tensors(self, device="cpu"):
        return self._content[1]


def written(config, layout, head=None, seed=0):
    """Return a published config and tensors of a model whose every tensor was drawn, and what is read from them."""
    torch.manual_seed(seed)
    model = config.build()
    values, tensors = published.write(model if head is None else Classifier(model, head), layout)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith("inv_freq"):
            noise = torch.randn_like(tensor) * 0.1
            # Poles must stay inside the unit circle.
            tensors[name] = tensor * 0.9 + noise * 0.05 if name.endswith("poles") else tensor.detach().clone() + noise
    imported = published.read(InMemory(values, tensors))
    return values, tensors, imported


def ids_of(length=13, low=7, high=12, rows=1, seed=1):
    """Return random ids of the bases."""
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(got, truth, tolerance=2e-5):
    """Assert that float32 numbers are those of float64."""
    truth = truth.detach()
    torch.testing.assert_close(got.detach().double(), truth, atol=tolerance * float(truth.abs().max()), rtol=1e-4)
