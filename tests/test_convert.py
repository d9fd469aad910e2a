"""Converting: there and back bit for bit, and out to transformers in a process that has never heard of genossm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genossm import checkpoint, source
from genossm.convert import convert
from genossm.files import write_folder_atomically
from genossm.inference import tokenizer_of
from genossm.models.classifier import Classifier
from genossm.models.cnn import CNNConfig
from genossm.models.mamba import Mamba2Config
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.models.transformer import TransformerConfig
from genossm.nn.head import HeadConfig

PARITY = Path(__file__).parent / "data" / "parity"
OUTSIDE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("genossm", "numba", "triton", "jaxtyping"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
import json, pathlib, numpy, torch, transformers
for folder, kind in json.loads(sys.argv[1]):
    def opened(kind, folder=folder):
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    model, base, tokenizer = opened(kind).eval(), opened("AutoModel").eval(), opened("AutoTokenizer")
    io = numpy.load(folder + ".npz")
    ids = torch.from_numpy(io["input_ids"])
    out = {}
    with torch.no_grad():
        out["logits"], out["states"] = model(ids).logits, base(ids).last_hidden_state
        model.save_pretrained(folder + "-again")
        again = opened(kind, folder + "-again").eval()
        out["again"] = again(ids).logits
        if kind == "AutoModelForCausalLM":
            out["generated"] = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
        if kind != "AutoModelForSequenceClassification":
            classifier = opened("AutoModelForSequenceClassification").eval()
            out["head"] = classifier(ids[:1]).logits
            # At most 5 of its own standard deviations: drawn, and not what the memory held.
            out["drawn"] = all(w.abs().max() < 0.1 for w in classifier.head.parameters())
            kept = dict(base.backbone.named_parameters())
            out["kept"] = all(torch.equal(w, kept[n]) for n, w in classifier.backbone.named_parameters())
            if folder.endswith("hybrid"):
                classifier.save_pretrained(folder + "-head")
    model.train()
    labels = ids[:, 0] % 2 if kind.endswith("Classification") else ids
    model(ids, labels=labels).loss.backward()
    out["named"] = list(getattr(model.config, "id2label", {}).values())
    out["grads"] = sum(p.grad is not None for p in model.parameters())
    batch = tokenizer(["ACGTACGTAC", "ACG"], padding=True)
    out["ids"], out["mask"] = batch["input_ids"], batch["attention_mask"]
    out["cut"] = tokenizer("ACGTACGTACGTNNACGTACGT", truncation=True, max_length=4)["input_ids"]
    if tokenizer.mask_token is not None:
        out["masked"] = tokenizer("AC" + tokenizer.mask_token + "GT")["input_ids"]
    numpy.savez(folder + ".out.npz", **out)
"""
LM, MLM, CLS = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
CASES = {
    **{"hyenadna-hf-tiny": LM, "hyenadna-hf-seqcls": CLS, "caduceus-ps-tied": MLM, "caduceus-ps-seqcls": CLS},
    **{"caduceus-ph-tied": MLM, "mamba2-ssm-tiny": LM, "mamba-ssm-tiny": LM, "stripedhyena-evo1-tiny": LM},
    **{"nt-v1-tiny": MLM, "nt-v2-tiny": MLM, "transformer": LM, "encoder": MLM, "cnn": MLM, "hybrid": LM},
    **{"nt-classifier": CLS, "esm2": MLM, "hyenadna-ckpt-head-pool": CLS},
}
ESM = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "positions": "rotary"}
FRESH = {
    "transformer": TransformerConfig(d_model=16, n_layer=2, n_head=2),
    "encoder": TransformerConfig(d_model=16, n_layer=2, n_head=2, causal=False),
    "cnn": CNNConfig(d_model=16, n_layer=2),
    "nt-classifier": NucleotideTransformerConfig(**ESM),
    "esm2": NucleotideTransformerConfig(
        **ESM, vocab_size=33, tokenizer="esm2", mask_id=32, rescale_masked=True, tie_embeddings=True
    ),
    "hybrid": Mamba2Config(d_model=16, n_layer=2, d_state=8, headdim=8, attn_layer_idx=(1,), n_head=2),
}


def tensors_of(folder):
    return source.find(folder).read_tensors()


@pytest.mark.parametrize("case", sorted(folder.name for folder in PARITY.iterdir() if folder.is_dir()))
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
    # With --overwrite too, only a model is replaced.
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no model"):
        convert(str(PARITY / "nt-v1-tiny"), str(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("to", ["genossm", "hf", "esm"])
def test_a_model_is_replaced_whole_and_a_dry_run_writes_nothing(to, tmp_path):
    source_, target = str(PARITY / "nt-v1-tiny"), tmp_path / "model"
    dry = convert(source_, str(target), to=to, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save(FRESH["cnn"].build(), target)
    written = convert(source_, str(target), to=to, overwrite=True)
    assert (written.layout, written.tensors, written.parameters) == (dry.layout, dry.tensors, dry.parameters)
    assert (dry.written, written.written) == (False, True)
    assert len(tensors_of(target)) == written.tensors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_interrupts_writing_leaves_what_was_there(tmp_path):
    def interrupted(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    checkpoint.save(FRESH["cnn"].build(), tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    for name in ("model", "new"):
        with pytest.raises(KeyboardInterrupt):
            write_folder_atomically(tmp_path / name, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    checkpoint.save(FRESH["cnn"].build(), tmp_path / "precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    convert(str(PARITY / "nt-v1-tiny"), str(tmp_path / "link"), overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "precious").config == FRESH["cnn"]


def test_a_damaged_memory_of_the_published_file_is_named(tmp_path):
    convert(str(PARITY / "mamba-ssm-tiny"), str(tmp_path / "ours"))
    (tmp_path / "ours" / "origin.json").write_text('{"layout": "mamba"}')
    with pytest.raises(ValueError, match=r"origin\.json is damaged"):
        convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="original")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Export every case and open all of them in one process that has never heard of genossm."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("outside")
    for case, config in FRESH.items():
        torch.manual_seed(0)
        model = config.build()
        if CASES[case] == CLS:
            model = Classifier(
                model, HeadConfig(n_outputs=2, pooling="first", hidden=True, names=("promoter", "other"))
            )
        checkpoint.save(model, folder / "ours" / case, {"training data": "chr20", "metrics": {"mcc": 0.5}})
    opened = {}
    for case in CASES:
        source_ = folder / "ours" / case if case in FRESH else PARITY / case
        convert(str(source_), str(folder / case), to="hf")
        model = (checkpoint.load_classifier if CASES[case] == CLS else checkpoint.load)(source_)
        rows = FRESH[case].vocab_size if case in FRESH else 0
        ids = torch.randint(rows, (2, 24)) if rows else torch.from_numpy(np.load(PARITY / case / "io.npz")["input_ids"])
        np.savez(folder / f"{case}.npz", input_ids=ids[:, :40])
        opened[case] = model, ids[:, :40]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    arguments = json.dumps([[str(folder / case), kind] for case, kind in CASES.items()])
    ran = subprocess.run(
        [sys.executable, "-c", OUTSIDE, arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, opened


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_opens_it_without_genossm(case, outside):
    folder, opened = outside
    model, ids = opened[case]
    got = np.load(folder / f"{case}.out.npz")
    if CASES[case] == CLS:
        expected, states = model(ids), model.backbone(ids)
    else:
        states = model(ids)
        expected = model.logits(states)
    np.testing.assert_allclose(got["logits"], expected.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(got["states"], states.numpy(), atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(got["again"], got["logits"])
    assert got["grads"] > 5
    if CASES[case] != CLS:
        assert got["drawn"]
        assert got["kept"]
    if CASES[case] == LM:
        written = ids[:1, :5]
        for _ in range(6):
            written = torch.cat([written, model.logits(model(written))[:, -1:].argmax(-1)], 1)
        assert got["generated"].tolist() == written.tolist()


@pytest.mark.parametrize("case", CASES)
def test_its_tokenizer_is_ours(case, outside):
    folder, opened = outside
    model, _ = opened[case]
    got, ours = np.load(folder / f"{case}.out.npz"), tokenizer_of(model if CASES[case] != CLS else model.backbone)
    ids, mask = ours.encode_batch(["ACGTACGTAC", "ACG"], side="right")
    assert got["ids"].tolist() == ids.tolist()
    assert got["mask"].tolist() == mask.astype(int).tolist()
    assert got["cut"].tolist() == ours.encode_batch(["ACGTACGTACGTNNACGTACGT"], max_length=4)[0][0].tolist()
    if "masked" in got:
        word = ours.vocabulary[ours.mask_id]
        assert got["masked"].tolist() == ours.encode(f"AC{word}GT", special=True).tolist()


@pytest.mark.parametrize("case", ["hyenadna-hf-tiny", "cnn"])
def test_its_code_is_one_plain_file_and_its_card_says_what_is_known(case, outside):
    folder, _ = outside
    code = (folder / case / "modeling_genossm.py").read_text()
    assert not re.search(r"\b(exec|eval|compile|__import__|import_module)\(|^\s*(from|import) genossm", code, re.M)
    compile(code, "modeling_genossm.py", "exec")
    card = (folder / case / "README.md").read_text()
    assert "## Training data and metrics" in card
    assert ("- training data: chr20" in card) == (case == "cnn")
    assert ("  - mcc: 0.5" in card) == (case == "cnn")
    assert "- layout: hyenadna-hf" in card or case == "cnn"
    assert "| n_layer | 2 |" in card


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_transformers_saved_comes_back(case, outside):
    folder, opened = outside
    model, ids = opened[case]
    saved = folder / f"{case}-again"
    again = (checkpoint.load_classifier if CASES[case] == CLS else checkpoint.load)(saved)
    assert torch.equal(again(ids), model(ids))
    if CASES[case] != CLS:
        with pytest.raises(ValueError, match="without a head"):
            checkpoint.load_classifier(saved)


def test_a_head_that_transformers_added_comes_back(outside):
    folder, _ = outside
    got = np.load(folder / "hybrid.out.npz")
    again = checkpoint.load_classifier(folder / "hybrid-head")
    with torch.no_grad():
        answers = again(torch.from_numpy(np.load(folder / "hybrid.npz")["input_ids"][:1]))
    np.testing.assert_allclose(answers.numpy(), got["head"], atol=2e-5)


def test_names_of_the_answers_are_those_of_transformers(outside):
    folder, _ = outside
    assert np.load(folder / "nt-classifier.out.npz")["named"].tolist() == ["promoter", "other"]
