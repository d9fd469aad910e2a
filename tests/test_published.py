"""Published checkpoints: the same numbers as the official code, and the same file again on the way back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genossm import checkpoint, published, source

PARITY = Path(__file__).parent / "data" / "parity"
FAMILIES = ("hyenadna", "nt", "stripedhyena")
CASES = sorted(folder.name for folder in PARITY.iterdir() if folder.name.startswith(FAMILIES))


def open_case(name):
    return published.read(source.find(PARITY / name))


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_file_again(case):
    imported = open_case(case)
    config, tensors = published.write(imported.classifier or imported.backbone, imported.origin.layout, imported.origin)
    files = source.find(PARITY / case)
    assert config == files.read_config()
    original = files.read_tensors()
    assert list(tensors) == list(original)
    for name, tensor in original.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_export_is_read_again_with_the_same_numbers(case):
    imported = open_case(case)
    model = imported.classifier or imported.backbone
    config, tensors = published.write(model, imported.origin.layout)
    again = published.read(InMemory(config, tensors))
    for (name, one), other in zip(
        model.state_dict().items(), (again.classifier or again.backbone).state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


class InMemory(source.Source):
    """A source whose files were never written."""

    def __init__(self, config, tensors):
        super().__init__("memory", None, Path())
        object.__setattr__(self, "_content", (config, tensors))

    def read_config(self):
        return self._content[0]

    def read_tensors(self, device="cpu"):
        return self._content[1]


def test_pickled_and_safe_files_of_one_model_give_one_model():
    for case in ("hyenadna-ckpt-lm", "hyenadna-ckpt-head-pool"):
        folder = PARITY / case
        files = [path for path in folder.iterdir() if path.suffix in (".ckpt", ".bin", ".safetensors")]
        first, *others = [checkpoint.load(path).state_dict() for path in sorted(files)]
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
        assert len(files) > 1


def test_numbers_are_those_of_the_official_code():
    folder = PARITY / "hyenadna-hf-tiny"
    model = checkpoint.load(folder)
    io = np.load(folder / "io.npz")
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(io["input_ids"])))
    np.testing.assert_allclose(logits.numpy(), io["logits"], atol=2e-4, rtol=1e-4)
