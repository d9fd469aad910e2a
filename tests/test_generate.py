import math

import numpy as np
import pytest
import torch

from genossm import checkpoint
from genossm.generate import Sampling, generate
from genossm.models.base import model_types
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.models.transformer import TransformerConfig

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]


def shares(sampling, draws=2000):
    uniform = (torch.arange(draws) + 0.5) / draws
    picked = sampling.draw(LOGITS.expand(draws, 4), uniform)
    return (picked.bincount(minlength=4) / draws).tolist()


def test_draws_follow_the_probabilities():
    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=2e-3)
    half = [p**2 for p in (0.5, 0.3, 0.15, 0.05)]
    assert shares(Sampling(temperature=0.5)) == pytest.approx([p / sum(half) for p in half], abs=2e-3)
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert str(Sampling(temperature=0.5, top_k=3, top_p=0.9)) == "temperature=0.5 top_k=3 top_p=0.9"


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), 2),
        (Sampling(top_p=0.79), 2),
        (Sampling(top_p=0.81), 3),
        (Sampling(min_p=0.25), 3),
        (Sampling(min_p=1.0), 1),
        (Sampling(top_k=3, min_p=0.5), 2),
    ],
)
def test_filters_keep_the_likeliest(sampling, kept):
    found = shares(sampling)
    truth = [0.5, 0.3, 0.15, 0.05][:kept]
    assert found == pytest.approx([p / sum(truth) for p in truth] + [0] * (4 - kept), abs=2e-3)


def build(kind):
    torch.manual_seed(4)
    if kind == "hyenadna":
        return HyenaDNAConfig(d_model=16, n_layer=2, max_length=128).build().eval()
    if kind == "transformer":
        return TransformerConfig(d_model=16, n_layer=2, n_head=2).build().eval()
    shape = {"headdim": 16, "d_state": 16} if kind == "mamba2" else {}
    return model_types()[kind](d_model=16, n_layer=2, **shape).build().eval()


@pytest.mark.parametrize("kind", ["hyenadna", "transformer", "mamba", "mamba2", "striped_hyena"])
def test_greedy_is_the_likeliest_base_after_the_whole_prefix(kind):
    model = build(kind)
    prompts = ["ACGTTGCA", "GGA", "T", "CCTAAGTC"]
    made = generate(model, prompts, length=24, temperature=0).sequences
    for prompt, text in zip(prompts, made, strict=True):
        whole = prompt + text
        ids = torch.tensor([["ACGT".index(base) + 7 for base in whole]])
        with torch.no_grad():
            logits = model.logits(model(ids))[0, len(prompt) - 1 : -1, 7:11]
        picked = logits.gather(1, ids[0, len(prompt) :, None] - 7)[:, 0]
        assert float((logits.max(1).values - picked).max()) < 1e-4


def test_a_seed_repeats_whatever_else_is_made():
    model = build("transformer")
    together = generate(model, ["ACGT", "GG"], n=3, length=40, seed=5).sequences
    assert generate(model, ["ACGT", "GG"], n=3, length=40, seed=5, batch_size=1).sequences == together
    assert generate(model, ["ACGT", "GG"], n=3, length=40, seed=6).sequences != together
    assert len(set(together)) == 6


def test_n_is_banned_unless_asked_for():
    model = build("transformer")
    with torch.no_grad():
        model.embedding.weight[11] = 3 * model.norm_f.weight
    assert "N" not in "".join(generate(model, "ACGT", n=4, length=50).sequences)
    assert "N" in "".join(generate(model, "ACGT", n=4, length=50, temperature=5.0, allow_n=True).sequences)


def test_statistics_stand_beside_the_genome(tmp_path, chr20):
    result = generate(build("transformer"), "ACGT", n=4, length=300, genome=chr20.paths[0], out=tmp_path / "new.fa")
    ours, theirs = result.statistics["sequences"], result.statistics["genome"]
    assert 0.3 < theirs["gc"] < 0.6
    assert math.isfinite(ours["gc"])
    assert ours["4mer_divergence_bits"] > theirs["4mer_divergence_bits"]
    lines = (tmp_path / "new.fa").read_text().splitlines()
    assert lines[0].startswith(">prompt1_1 model=Transformer weights=")
    assert "seed=0" in lines[0]
    assert lines[0].endswith("temperature=1")
    assert lines[1] == result.sequences[0]
    again = generate(build("transformer"), "ACGT", n=1, length=8, with_prompt=True).sequences[0]
    assert again[:4] == "ACGT"
    assert len(again) == 12


def test_bad_input(tmp_path, monkeypatch, capsys):
    from genossm import cli

    causal = build("hyenadna")
    for values, message in (
        ({"prompt": ""}, "at least one base"),
        ({"prompt": "ACGU!"}, "no nucleotide"),
        ({"prompt": "ACGT", "length": 0}, "length must be"),
        ({"prompt": "ACGT", "length": 125}, "at most 128"),
        ({"prompt": "ACGT", "temperature": -1.0}, "temperature"),
        ({"prompt": "ACGT", "top_p": 0.0}, "top_p"),
        ({"prompt": "ACGT", "min_p": 2.0}, "min_p"),
        ({"prompt": "ACGT", "top_k": -1}, "top_k"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(causal, **values)
    both = HyenaDNAConfig(d_model=16, n_layer=1, max_length=64, bidirectional=True).build()
    with pytest.raises(ValueError, match="can't generate"):
        generate(both, "ACGT")
    checkpoint.save(causal, tmp_path / "model")
    out = tmp_path / "new.fa"
    arguments = [
        "generate",
        "--model",
        tmp_path / "model",
        "--prompt",
        "ACGT,GG",
        "--n",
        2,
        "--length",
        9,
        "--out",
        out,
    ]
    monkeypatch.setattr("sys.argv", ["genossm", *map(str, arguments)])
    for code in (0, 2):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    assert "--overwrite" in capsys.readouterr().err
    assert np.char.count(out.read_text(), ">") == 4
