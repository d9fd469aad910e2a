"""Published checkpoints: the same numbers as the official code, and the same file again on the way back."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts.written import InMemory

from genossm import published, source

PARITY = Path(__file__).parent / "data" / "parity"
CASES = sorted(folder.name for folder in PARITY.iterdir() if folder.is_dir())

_SPEC = importlib.util.spec_from_file_location(
    "check_parity", Path(__file__).parent.parent / "scripts" / "check_parity.py"
)
CHECK = importlib.util.module_from_spec(_SPEC)
sys.modules["check_parity"] = CHECK
_SPEC.loader.exec_module(CHECK)


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


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_official_code(case):
    rows = CHECK.check(PARITY / case)
    assert not [row for row in rows if not row.passed]
    # How far the official code is from its own float64 is nothing of ours.
    assert not [row.quantity for row in rows if row.difference is None and row.quantity != "f64_yardstick_maxdiff"]
    assert len(rows) >= 4


def test_a_wrong_number_fails(tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(PARITY / "nt-v1-tiny", folder)
    with np.load(folder / "io.npz") as io:
        values = dict(io)
    values["logits"][0, 0, 0] += 1e-3
    np.savez(folder / "io.npz", **values, another=np.zeros(2))
    assert CHECK.main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"logits .*FAIL", shown)
    assert re.search(r"another .*not checked", shown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyena_order": 3}, "hyena_order=3"),
        ({"short_filter_order": 4}, "short_filter_order=4"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"d_model": None}, "d_model must be a whole number"),
        ({"n_layer": 3}, "layers.2.norm1.weight is missing"),
        ({"n_layer": 1}, "layers.1.mixer.filter_fn.bias is unknown"),
        ({"d_inner": 64}, r"mlp.fc1.weight has shape \(128, 32\) instead of \(64, 32\)"),
        ({"model_type": "unheard"}, "no family that we read"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    files = source.find(PARITY / "hyenadna-hf-tiny")
    config = {**files.read_config(), **change}
    with pytest.raises(ValueError, match=message):
        published.read(InMemory(config, files.read_tensors()))


def test_a_tensor_too_many_and_one_that_differs_from_its_twin_are_named():
    files = source.find(PARITY / "hyenadna-ckpt-lm")
    config, tensors = files.read_config(), files.read_tensors()
    with pytest.raises(ValueError, match=r"model\.backbone\.extra is unknown"):
        published.read(InMemory(config, {**tensors, "model.backbone.extra": torch.zeros(1)}))
    name = "model.lm_head.weight"
    with pytest.raises(ValueError, match="weight differs"):
        published.read(InMemory(config, {**tensors, name: tensors[name] + 1}))


def test_trained_positions_are_kept():
    files = source.find(PARITY / "hyenadna-hf-tiny")
    config, tensors = files.read_config(), files.read_tensors()
    name = "hyena.backbone.layers.0.mixer.filter_fn.pos_emb.z"
    trained = {**tensors, name: tensors[name] + 0.1}
    imported = published.read(InMemory(config, trained))
    assert imported.backbone.config.own_positions
    _, again = published.write(imported.backbone, "hyenadna-hf", imported.origin)
    assert torch.equal(again[name], trained[name])
