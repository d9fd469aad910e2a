import numpy as np
import pytest
import torch

from genossm import checkpoint
from genossm.dna import alphabet
from genossm.ism import ism
from genossm.models.base import model_types
from genossm.models.hyenadna import HyenaDNAConfig


def build(kind):
    torch.manual_seed(6)
    if kind in ("hyenadna", "bidirectional"):
        shape = {"max_length": 64, "bidirectional": kind == "bidirectional"}
        return HyenaDNAConfig(d_model=16, n_layer=2, **shape).build().eval()
    return model_types()[kind](d_model=16, n_layer=2).build().eval()


@pytest.fixture(scope="module")
def text(chr20):
    return alphabet.to_text(chr20.codes(next(iter(chr20.contigs)))[9000:9033]).upper()


def nats(model, text):
    ids = torch.from_numpy(alphabet.from_text(text).copy())[None].long()
    with torch.no_grad():
        logp = model.logits(model(ids)).log_softmax(-1)[0, :-1].double()
    return float(logp.gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize("kind", ["hyenadna", "mamba"])
def test_every_substitution_is_compared_with_the_sequence(kind, text):
    model = build(kind)
    got = ism(model, [text], batch_size=7).matrix()
    assert got.shape == (4, 33)
    for at in range(len(text)):
        for row, base in enumerate("ACGT"):
            truth = nats(model, text[:at] + base + text[at + 1 :]) - nats(model, text)
            assert got[row, at] == pytest.approx(truth, abs=1e-4)


def test_masked_models_are_asked_at_the_hidden_base(text):
    model = build("bidirectional")
    got = ism(model, [text]).matrix()
    ids = torch.from_numpy(alphabet.from_text(text).copy())[None]
    reference = int(ids[0, 10])
    ids[0, 10] = 3
    with torch.no_grad():
        logp = model.logits(model(ids)).log_softmax(-1)[0, 10, 7:11]
    np.testing.assert_allclose(got[:, 10], (logp - logp[reference - 7]).numpy(), atol=1e-5)


def test_the_batch_is_mended_after_each_edit(text):
    model = build("hyenadna")
    one, other = (ism(model, [text], batch_size=size, methods=["l2", "llr"]).table for size in (1, 50))
    for name in ("l2", "llr"):
        np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), atol=1e-4)


def test_regions_in_their_context_and_tracks(tmp_path, text):
    import pybigtools

    model = build("hyenadna")
    genome, bed = tmp_path / "g.fa", tmp_path / "r.bed"
    genome.write_text(f">c\n{text}\n")
    bed.write_text("c\t10\t14\tplus\t0\t+\nc\t20\t23\tminus\t0\t-\n")
    result = ism(model, bed=bed, genome=genome, context=33, out=tmp_path / "i.parquet")
    whole = ism(model, [text]).matrix()
    np.testing.assert_allclose(result.matrix(0), whole[:, 10:14], atol=1e-4)
    other = ism(model, [alphabet.reverse_complement_text(text)]).matrix()
    np.testing.assert_allclose(result.matrix(1), other[:, 10:13], atol=1e-4)
    for name in ("t.bedgraph", "t.bw"):
        ism(model, bed=bed, genome=genome, context=33, out=tmp_path / name)
    lines = [line.split() for line in (tmp_path / "t.bedgraph").read_text().splitlines()]
    assert [int(line[1]) for line in lines] == [10, 11, 12, 13, 20, 21, 22]
    assert float(lines[0][3]) == pytest.approx(-whole[:, 10].sum() / 3, rel=1e-4)
    track = pybigtools.open(str(tmp_path / "t.bw"))
    np.testing.assert_allclose(track.values("c", 10, 14, fillna=0), [float(line[3]) for line in lines[:4]], rtol=1e-4)


def test_tracks_are_sorted_whatever_the_order_and_overlap_of_the_regions(tmp_path, text, monkeypatch):
    monkeypatch.setattr("genossm.ism._PART_POSITIONS", 4)
    model = build("hyenadna")
    genome, bed = tmp_path / "g.fa", tmp_path / "r.bed"
    genome.write_text(f">b\n{text}\n>a\n{text[::-1]}\n")
    bed.write_text("a\t3\t9\nb\t20\t30\tx\t0\t-\nb\t0\t6\nb\t24\t33\n")
    ism(model, bed=bed, genome=genome, context=33, out=tmp_path / "t.bedgraph")
    lines = [line.split() for line in (tmp_path / "t.bedgraph").read_text().splitlines()]
    truth = [("b", at) for at in [*range(6), *range(20, 33)]] + [("a", at) for at in range(3, 9)]
    assert [(line[0], int(line[1])) for line in lines] == truth
    table = ism(model, bed=bed, genome=genome, context=33).table.to_pylist()
    shared = [row["llr"] for row in table if row["chrom"] == "b" and row["position"] == 25]
    assert len(shared) == 6
    assert float(dict(zip(truth, (line[3] for line in lines), strict=True))["b", 25]) == pytest.approx(
        -np.mean(shared), rel=1e-4
    )


def test_n_is_left_out():
    table = ism(build("hyenadna"), ["ACNGT"]).table
    assert table["position"].to_pylist() == [0] * 3 + [1] * 3 + [3] * 3 + [4] * 3


def test_bad_input(tmp_path, text):
    model = build("hyenadna")
    with pytest.raises(ValueError, match="longer than the model's input of 64"):
        ism(model, [text * 2])
    with pytest.raises(ValueError, match="give bed and genome"):
        ism(model, [text], out=tmp_path / "t.bw")
    with pytest.raises(KeyError, match="llr"):
        ism(model, [text]).matrix(column="best")


def test_command_line(tmp_path, text, monkeypatch):
    from genossm import cli

    checkpoint.save(build("hyenadna"), tmp_path / "model")
    (tmp_path / "in.fa").write_text(f">s\n{text}\n")
    values = ["ism", "--model", tmp_path / "model", "--fasta", tmp_path / "in.fa", "--out", tmp_path / "i.tsv"]
    monkeypatch.setattr("sys.argv", ["genossm", *map(str, values)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len((tmp_path / "i.tsv").read_text().splitlines()) == 1 + 3 * len(text)
