"""The doctor: healthy models pass, broken ones are named, and an install is described."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from genossm import checkpoint
from genossm.cli import run
from genossm.doctor import causality, doctor
from genossm.models.hyenadna import HyenaDNAConfig

PARITY = Path(__file__).parent / "data" / "parity"


@pytest.mark.parametrize("case", ["caduceus-ps-tied", "stripedhyena-evo1-tiny", "hyenadna-hf-tiny"])
def test_published_models_are_healthy(case):
    report = doctor(str(PARITY / case), length=48)
    failed = [finding for finding in report.findings if finding.passed is False]
    assert not [finding for finding in failed if finding.check != "tokenizer fits"]
    assert "pass" in report.summary()["padding changes nothing"]


@torch.no_grad()
def test_a_model_that_looks_ahead_fails():
    model = HyenaDNAConfig(d_model=16, n_layer=1, max_length=64, bidirectional=True).build().eval()
    ids = torch.randint(7, 11, (2, 32))
    assert causality(model, ids).check == "reads both ways"
    type(model).causal, kept = property(lambda self: True), type(model).causal
    try:
        assert causality(model, ids).passed is False
    finally:
        type(model).causal = kept


def test_an_install_is_described(monkeypatch):
    summary = doctor().summary()
    assert "backend numba on cpu" in summary
    assert doctor().healthy
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.6.3" if name == "lightning" else version(name))
    assert doctor().summary()["lightning"].startswith("FAIL 2.6.3 the wheels were malicious")


def test_a_short_length_is_refused(tmp_path):
    checkpoint.save(HyenaDNAConfig(d_model=16, n_layer=1, max_length=64).build(), tmp_path / "m")
    with pytest.raises(ValueError, match="at least 8"):
        doctor(str(tmp_path / "m"), length=4)


def test_a_failed_check_ends_with_exit_code_1(capsys):
    with pytest.raises(SystemExit) as ended:
        run("doctor", [str(PARITY / "nt-v1-tiny"), "--length", "16"])
    assert ended.value.code == 1
    assert "tokenizer fits: FAIL 4107 ids 64 rows" in capsys.readouterr().out
