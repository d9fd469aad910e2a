"""The doctor: healthy models pass, broken ones are named, and an install is described."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from genossm import checkpoint
from genossm.cli import run
from genossm.doctor import causality, doctor
from genossm.models.hyenadna import HyenaDNAConfig

PARITY = Path(__file__).parent / "data" / "parity"


OPS = {"caduceus-ps-tied": "selective_scan", "stripedhyena-evo1-tiny": "fftconv", "hyenadna-hf-tiny": "hyena_conv"}


@pytest.mark.parametrize("case", OPS)
def test_published_models_are_healthy(case):
    report = doctor(str(PARITY / case), length=48)
    assert report.healthy
    shown = report.summary()
    promised = ("reverse complement",) if "caduceus" in case else ("step = parallel", "pieces = whole", "causality")
    for check in ("padding changes nothing", "finite", "bfloat16 drift", "tokenizer round trip", *promised):
        assert shown[check].startswith("pass "), check
    assert {"family", "parameters", "context"} <= set(shown)
    # The ops that ran, and no others.
    assert f"backend of {OPS[case]}" in shown
    assert "backend of ssd" not in shown


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


def test_a_failed_check_ends_with_exit_code_1(tmp_path, capsys):
    model = HyenaDNAConfig(d_model=16, n_layer=1, max_length=64).build()
    torch.nn.init.constant_(model.norm_f.weight, torch.nan)
    checkpoint.save(model, tmp_path / "m")
    with pytest.raises(SystemExit) as ended:
        run("doctor", [str(tmp_path / "m"), "--length", "16"])
    assert ended.value.code == 1
    assert re.search(r"^finite +FAIL  largest nan$", capsys.readouterr().out, re.M)


def test_a_tokenizer_that_the_model_has_no_rows_for_is_told():
    shown = doctor(str(PARITY / "nt-v1-tiny"), length=16).summary()
    assert shown["tokenizer fits"] == "- no: 4107 ids, 64 rows; the model takes ids but no text"
