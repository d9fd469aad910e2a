"""Converting: there and back bit for bit, and out to transformers in a process that has never heard of genossm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genossm import checkpoint, source
from genossm.convert import convert

PARITY = Path(__file__).parent / "data" / "parity"
OUTSIDE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genossm", "numba", "triton", "jaxtyping"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
import numpy, torch, transformers
folder, kind, out = sys.argv[1:]
kind = getattr(transformers, kind)
model = kind.from_pretrained(folder, trust_remote_code=True).eval()
base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.from_numpy(numpy.load(out)["input_ids"])
with torch.no_grad():
    logits, states = model(ids).logits, base(ids).last_hidden_state
batch = tokenizer(["ACGTACGTAC", "ACG"], padding=True)
numpy.savez(out, logits=logits, states=states, ids=batch["input_ids"], mask=batch["attention_mask"])
"""
CASES = {
    "hyenadna-hf-tiny": "AutoModelForCausalLM",
    "hyenadna-hf-seqcls": "AutoModelForSequenceClassification",
    "caduceus-ps-tied": "AutoModelForMaskedLM",
    "caduceus-ps-seqcls": "AutoModelForSequenceClassification",
    "mamba2-ssm-tiny": "AutoModelForCausalLM",
    "mamba-ssm-tiny": "AutoModelForCausalLM",
    "stripedhyena-evo1-tiny": "AutoModelForCausalLM",
    "nt-v1-tiny": "AutoModelForMaskedLM",
}


def tensors_of(folder):
    return source.find(folder).read_tensors()


@pytest.mark.parametrize("case", ["hyenadna-ckpt-head-pool", "nt-v2-tiny", "caduceus-ps-seqcls", "mamba-ssm-tiny"])
def test_there_and_back_is_the_same_file(case, tmp_path):
    convert(str(PARITY / case), str(tmp_path / "ours"))
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="original")
    original, back = tensors_of(PARITY / case), tensors_of(tmp_path / "back")
    assert set(original) == set(back)
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.items())
    config = json.loads((PARITY / case / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_what_can_be_computed_is_not_written(tmp_path):
    convert(str(PARITY / "hyenadna-hf-d48-odd"), str(tmp_path / "ours"))
    ours, original = (
        sum(t.nbytes for t in tensors_of(f).values()) for f in (tmp_path / "ours", PARITY / "hyenadna-hf-d48-odd")
    )
    assert ours < original - 3 * 1026 * 4 * 4


def test_a_folder_that_is_there_is_not_replaced_unasked(tmp_path):
    with pytest.raises(ValueError, match="there already"):
        convert(str(PARITY / "nt-v1-tiny"), str(tmp_path))
    with pytest.raises(ValueError, match="No layout is named 'evo9'"):
        convert(str(PARITY / "nt-v1-tiny"), str(tmp_path / "x"), to="evo9")


def outside(folder, kind, ids, tmp_path):
    np.savez(tmp_path / "io.npz", input_ids=ids)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    arguments = [str(folder), kind, str(tmp_path / "io.npz")]
    ran = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.load(tmp_path / "io.npz")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_it_without_genossm(case, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "exported"
    convert(str(PARITY / case), str(folder), to="hf")
    ids = np.load(PARITY / case / "io.npz")["input_ids"][:, :40]
    got = outside(folder, CASES[case], ids, tmp_path)
    with torch.no_grad():
        if CASES[case].endswith("Classification"):
            model = checkpoint.load_classifier(PARITY / case)
            expected, states = model(torch.from_numpy(ids)), model.backbone(torch.from_numpy(ids))
        else:
            model = checkpoint.load(PARITY / case)
            states = model(torch.from_numpy(ids))
            expected = model.logits(states)
    np.testing.assert_allclose(got["logits"], expected.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(got["states"], states.numpy(), atol=2e-5, rtol=1e-4)
    assert got["mask"].tolist()[1] == sorted(got["mask"].tolist()[1], reverse=True)
    assert "Training data and metrics" in (folder / "README.md").read_text()
