import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from genossm import checkpoint, effects
from genossm.dna import alphabet
from genossm.dna.variant import Variant, Vcf, normalise
from genossm.models.base import model_types
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.models.transformer import TransformerConfig
from genossm.score import score

HEADER = (
    '##fileformat=VCFv4.3\n##INFO=<ID=DP,Number=1,Type=Integer,Description="d">\n'
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="g">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tone\ttwo\n"
)


@pytest.fixture(scope="module")
def contig(chr20):
    return alphabet.to_text(chr20.codes(next(iter(chr20.contigs)))[7000:7400]).upper()


@pytest.fixture(scope="module")
def genome(contig, tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text(f">chr20\n{contig}\n")
    return path


@pytest.fixture
def vcf(contig, tmp_path):
    """SNVs, an MNV, an insertion, a deletion, several alleles, ends of the contig, what can't be scored."""

    def other(at):
        return alphabet.reverse_complement_text(contig[at])

    rows = [
        (1, contig[0], other(0)),
        (100, contig[99], ",".join(base for base in "ACGT" if base != contig[99])),
        (150, contig[149:152], "".join(other(at) for at in (149, 150, 151))),
        (200, contig[199], contig[199] + "GATTACA"),
        (250, contig[249:255], contig[249]),
        (300, contig[299], f"{other(299)},<DEL>,*,R"),
        (310, contig[309], "G[chr2:10["),
        (400, contig[399], other(399)),
        (397, contig[396:400], contig[396]),
    ]
    lines = [f"20\t{pos}\t.\t{ref}\t{alt}\t.\tPASS\tDP=3\tGT\t0/1\t1|1\n" for pos, ref, alt in rows]
    path = tmp_path / "in.vcf"
    path.write_text(HEADER + "".join(lines))
    return path


def build(kind):
    torch.manual_seed(2)
    if kind == "hyena":
        return HyenaDNAConfig(d_model=16, n_layer=2, max_length=64).build().eval()
    if kind == "bidirectional":
        return HyenaDNAConfig(d_model=16, n_layer=2, max_length=64, bidirectional=True).build().eval()
    if kind == "transformer":
        return TransformerConfig(d_model=16, n_layer=2, n_head=2).build().eval()
    if kind == "nucleotide_transformer":
        shape = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "pad_id": 4, "mask_id": 3}
        return NucleotideTransformerConfig(**shape, vocab_size=12, tokenizer="char").build().eval()
    shape = {"mamba2": {"headdim": 16, "d_state": 16}, "striped_hyena": {"attn_layer_idx": ()}}.get(kind, {})
    return model_types()[kind](d_model=16, n_layer=2, **shape).build().eval()


def nats(model, text):
    """The log-likelihood of a text, written down plainly."""
    ids = torch.from_numpy(alphabet.from_text(text))[None].long()
    with torch.no_grad():
        logp = model.logits(model(ids)).log_softmax(-1)[0, :-1].double()
    return float(logp.gather(1, ids[0, 1:, None]).sum())


def both_strands(model, contig, start, ref, alt, grid, window=64):
    """The mean over both strands of the ratio; windows by hand."""
    centred = (2 * start + len(ref)) // 2 - window // 2
    begins = [grid * number for number in range(-window, len(contig))]
    nearest = min(begins, key=lambda first: (abs(first - centred), -first))
    first = min(max(0, nearest), len(contig) - window)
    last = first + window
    changed = contig[:start] + alt + contig[start + len(ref) :]
    forward = changed[first : first + window]
    shift = len(alt) - len(ref)
    reverse = changed[max(0, last + shift - window) : last + shift]
    rc = alphabet.reverse_complement_text
    reference = contig[first:last]
    return (nats(model, forward) - nats(model, reference) + nats(model, rc(reverse)) - nats(model, rc(reference))) / 2


@pytest.mark.parametrize(
    ("kind", "grid"), [("hyena", 1), ("transformer", 5), ("mamba", 1), ("mamba", None), ("mamba2", None)]
)
def test_causal_ratio_is_that_of_whole_windows_on_both_strands(kind, grid, contig, genome, vcf):
    model = build(kind)
    got = score(model, vcf=vcf, genome=genome, window=64, grid=grid).table.to_pylist()
    scored = [row for row in got if row["status"] == "scored"]
    assert len(scored) == 10
    for row in scored:
        if len(row["ref"]) != len(row["alt"]):
            # The window of an indel is that of its left-normalised form.
            codes = alphabet.from_text(contig)
            variant = normalise(Variant("chr20", row["pos"] - 1, row["ref"], row["alt"]), codes)
        else:
            variant = None
        start, ref, alt = (
            (variant.start, variant.ref, variant.alt) if variant else (row["pos"] - 1, row["ref"], row["alt"])
        )
        assert row["llr"] == pytest.approx(both_strands(model, contig, start, ref, alt, grid or 16), abs=2e-4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "striped_hyena"])
def test_sharing_the_state_changes_nothing(kind, genome, vcf):
    model = build(kind)
    options = {"vcf": vcf, "genome": genome, "window": 64, "methods": ["llr", "l2", "cosine"]}
    shared, plain = score(model, **options).table, score(model, share=False, **options).table
    for name in ("llr", "l2", "cosine"):
        one, other = (np.array(t.column(name).to_pylist(), dtype=float) for t in (shared, plain))
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.isfinite(one).sum() == 10


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "striped_hyena", "hyena"])
def test_sites_in_one_window_share_its_reference(kind, contig, genome, vcf, monkeypatch):
    model = build(kind)
    tokens = []
    model.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    monkeypatch.setattr(
        model, "extend", lambda ids, state: (tokens.append(ids.numel()), type(model).extend(model, ids, state))[1]
    )
    options = {"vcf": vcf, "genome": genome, "window": 64, "grid": 16, "methods": ["llr", "l2", "cosine"]}
    # As if each site were alone.
    with monkeypatch.context() as patch:
        patch.setattr(effects, "_by_reference", lambda sites, chosen: {number: [number] for number in chosen})
        alone = score(model, share=False, **options).table
    before = sum(tokens)
    monkeypatch.setattr(effects, "_STATES", 1)
    together = score(model, **options).table
    assert sum(tokens) - before < before
    for name in ("llr", "l2", "cosine"):
        one, other = (np.array(t.column(name).to_pylist(), dtype=float) for t in (together, alone))
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.isfinite(one).sum() == 10
    with pytest.raises(ValueError, match=r"grid must be in 1\.\.16, a quarter"):
        score(model, vcf=vcf, genome=genome, window=64, grid=17)


@pytest.mark.parametrize("kind", ["bidirectional", "nucleotide_transformer"])
def test_masked_ratio_is_at_the_site_of_a_hidden_base(kind, contig, genome, vcf):
    model = build(kind)
    rows = score(model, vcf=vcf, genome=genome, window=64, strand="forward").table.to_pylist()
    row = rows[2]
    first = 99 - 32
    ids = torch.from_numpy(alphabet.from_text(contig[first : first + 64]).copy())[None]
    ids[0, 32] = 3
    with torch.no_grad():
        logp = model.logits(model(ids)).log_softmax(-1)[0, 32]
    letters = "ACGT"
    truth = logp[7 + letters.index(row["alt"])] - logp[7 + letters.index(row["ref"])]
    assert row["llr"] == pytest.approx(float(truth), abs=1e-5)


def test_masked_ratio_of_indels_hides_as_many_bases_in_both(contig, genome, vcf):
    model = build("bidirectional")

    def hidden_nats(text, first, count):
        ids = torch.from_numpy(alphabet.from_text(text).copy())[None]
        true = ids[0, first : first + count].long()
        ids[0, first : first + count] = 3
        with torch.no_grad():
            logp = model.logits(model(ids)).log_softmax(-1)[0, first : first + count]
        return float(logp.gather(1, true[:, None]).sum())

    rc = alphabet.reverse_complement_text
    forward = score(model, vcf=vcf, genome=genome, window=64, strand="forward").table.to_pylist()
    both = score(model, vcf=vcf, genome=genome, window=64).table.to_pylist()
    found = {(len(row["ref"]), len(row["alt"])): at for at, row in enumerate(forward) if row["status"] == "scored"}
    variant = normalise(Variant("chr20", 199, contig[199], contig[199] + "GATTACA"), alphabet.from_text(contig))
    site, insertion, at = variant.start, variant.alt, variant.start - 32
    reference = contig[at : at + 64]
    changed = reference[:32] + insertion + reference[33 : 64 - 7]
    truth = hidden_nats(changed, 32, 8) - hidden_nats(reference, 32, 8)
    assert forward[found[1, 8]]["llr"] == pytest.approx(truth, abs=1e-4)
    changed = rc(contig[at + 7 : site] + insertion + contig[site + 1 : at + 64])
    other = hidden_nats(changed, 31, 8) - hidden_nats(rc(reference), 31, 8)
    assert both[found[1, 8]]["llr"] == pytest.approx((truth + other) / 2, abs=1e-4)
    assert forward[found[6, 1]]["llr"] is not None
    # At the contig's very end fewer bases are left to hide, but there is an answer.
    assert forward[found[4, 1]]["llr"] is not None


def test_distances(contig, genome, vcf):
    model = build("hyena")
    row = score(
        model, vcf=vcf, genome=genome, window=64, grid=1, strand="forward", methods=["l2", "cosine"]
    ).table.to_pylist()[1]
    with torch.no_grad():
        text = contig[99 - 32 : 99 + 32]
        ref, alt = (
            model(torch.from_numpy(alphabet.from_text(t))[None])[0].mean(0)
            for t in (text, text[:32] + row["alt"] + text[33:])
        )
    assert row["l2"] == pytest.approx(float((ref - alt).norm()), abs=1e-5)
    assert row["cosine"] == pytest.approx(1 - float(torch.cosine_similarity(ref, alt, dim=0)), abs=1e-5)


def test_head_of_a_fine_tuned_model(contig, genome, vcf, tmp_path):
    from genossm.models.classifier import Classifier
    from genossm.nn.head import HeadConfig

    torch.manual_seed(0)
    model = Classifier(build("hyena"), HeadConfig(n_outputs=2, names=("off", "on"))).eval()
    checkpoint.save(model, tmp_path / "tuned")
    row = score(tmp_path / "tuned", vcf=vcf, genome=genome, window=64, strand="forward").table.to_pylist()[1]
    text = contig[99 - 32 : 99 + 32]
    with torch.no_grad():
        ref, alt = (
            model(torch.from_numpy(alphabet.from_text(t))[None])[0] for t in (text, text[:32] + row["alt"] + text[33:])
        )
    assert row["delta_on"] == pytest.approx(float((alt - ref)[1]), abs=1e-5)
    with pytest.raises(ValueError, match="language-model head"):
        score(tmp_path / "tuned", vcf=vcf, genome=genome, methods=["llr"])
    with pytest.raises(ValueError, match="no head"):
        score(model.backbone, vcf=vcf, genome=genome, methods=["head"])


def test_annotated_vcf_keeps_everything_and_can_be_indexed(genome, vcf, tmp_path):
    pysam = pytest.importorskip("pysam")
    model = build("hyena")
    out = tmp_path / "scored.vcf.gz"
    result = score(model, vcf=vcf, genome=genome, window=64, methods=["llr", "l2"], out=out)
    assert result.counts == {"scored": 10, "symbolic": 2, "iupac": 1, "breakend": 1}
    before, after = list(Vcf(vcf)), list(Vcf(out))
    assert [r.columns[:7] + r.columns[8:] for r in before] == [r.columns[:7] + r.columns[8:] for r in after]
    assert all(new.columns[7].startswith(old.columns[7]) for old, new in zip(before, after, strict=True))
    assert set(Vcf(vcf).header) <= set(Vcf(out).header)
    assert any('methods="llr,l2",window="64",grid="16"' in line for line in Vcf(out).header)
    table = score(model, vcf=vcf, genome=genome, window=64, methods=["llr", "l2"]).table.to_pylist()
    with pysam.VariantFile(str(out)) as read:
        found = [(r.info["GENOSSM_LLR"], r.samples["two"]["GT"]) for r in read]
    assert found[1][0] == pytest.approx([row["llr"] for row in table[1:4]], rel=1e-4)
    assert found[5][0][1:] == (None, None, None)
    assert found[1][1] == (1, 1)
    assert "GENOSSM_STATUS=scored,symbolic,symbolic,iupac" in after[5].columns[7]
    # The fixture's last two records are out of order, which an index does not take.
    lines = out.read_bytes()
    ordered = tmp_path / "ordered.vcf.gz"
    ordered.write_bytes(lines)
    score(model, vcf=_sorted(vcf, tmp_path), genome=genome, window=64, out=tmp_path / "o.vcf.gz")
    pysam.tabix_index(str(tmp_path / "o.vcf.gz"), preset="vcf")
    with pysam.TabixFile(str(tmp_path / "o.vcf.gz")) as index:
        assert len(list(index.fetch("20", 99, 100))) == 1


def _sorted(vcf, folder):
    lines = vcf.read_text().splitlines()
    records = sorted((line for line in lines if line[0] != "#"), key=lambda line: int(line.split("\t")[1]))
    path = folder / "sorted.vcf"
    path.write_text("\n".join([line for line in lines if line[0] == "#"] + records) + "\n")
    return path


def test_ref_mismatch_by_policy(contig, genome, tmp_path):
    wrong = "A" if contig[49] != "A" else "C"
    path = tmp_path / "in.vcf"
    path.write_text(f"#CHROM\tPOS\tID\tREF\tALT\nchr20\t50\t.\t{wrong}\t{contig[49]}T\nchr20\t60\t.\t{contig[59]}\tN\n")
    model = build("hyena")
    with pytest.raises(ValueError, match=r"line 2: REF at chr20:50 .* genome has"):
        score(model, vcf=path, genome=genome)
    assert score(model, vcf=path, genome=genome, ref_mismatch="skip").counts == {"ref_mismatch": 1, "scored": 1}


def test_warn_scores_against_the_genome(contig, genome, tmp_path):
    letters = [base for base in "ACGT" if base != contig[49]]
    path = tmp_path / "in.vcf"
    path.write_text(
        f"#CHROM\tPOS\tID\tREF\tALT\nchr20\t50\t.\t{letters[0]}\t{letters[1]}\nchr20\t50\t.\t{contig[49]}\t{letters[1]}\n"
    )
    rows = score(build("hyena"), vcf=path, genome=genome, ref_mismatch="warn", window=64).table.to_pylist()
    assert rows[0]["llr"] == pytest.approx(rows[1]["llr"])


def test_parts_and_tables(genome, vcf, tmp_path, monkeypatch):
    model = build("hyena")
    options = {"vcf": vcf, "genome": genome, "window": 64}
    whole = score(model, out=tmp_path / "whole.parquet", **options)
    monkeypatch.setattr("genossm.score._PART_ALLELES", 2)
    for shard in ("2/2", "1/2"):
        result = score(model, out=tmp_path / "parts.parquet", shard=shard, **options)
    assert result.complete
    one, other = (pq.read_table(tmp_path / name) for name in ("whole.parquet", "parts.parquet"))
    assert one.drop(["llr"]).equals(other.drop(["llr"]))
    np.testing.assert_allclose(
        np.array(one["llr"].to_pylist(), float), np.array(other["llr"].to_pylist(), float), atol=1e-4
    )
    assert whole.counts["scored"] == 10
    score(model, out=tmp_path / "s.tsv", **options)
    assert (tmp_path / "s.tsv").read_text().splitlines()[0].split("\t")[:5] == ["chrom", "pos", "id", "ref", "alt"]


def test_bad_input_ends_with_exit_code_2(contig, genome, vcf, tmp_path, monkeypatch, capsys):
    from genossm import cli

    checkpoint.save(build("hyena"), tmp_path / "model")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["genossm", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    def written(text):
        path = tmp_path / f"{abs(hash(text))}.vcf"
        path.write_text(text)
        return path

    from genossm.models.classifier import Classifier
    from genossm.nn.head import HeadConfig

    tuned = tmp_path / "tuned"
    checkpoint.save(Classifier(build("hyena"), HeadConfig(n_outputs=2)), tuned)
    (tmp_path / "foreign.vcf").write_text("precious")
    protein = tmp_path / "protein.fa"
    protein.write_text(">chr20\nMKLVQQ\n")
    names = "#CHROM\tPOS\tID\tREF\tALT\n"
    model = ["--model", tmp_path / "model"]
    inputs = ["--genome", genome, "--out", tmp_path / "o.vcf"]
    for vcf_path, more, message in (
        (written("20\t5\t.\tA\tC\n"), [], "#CHROM"),
        (written(names + "20 5 . A C\n"), [], "tabs"),
        (written(names + "7\t5\t.\tA\tC\n"), [], "No contig is named '7'; there are: chr20"),
        (written(names), [], "holds no variant"),
        (vcf, ["--methods", "best"], "methods must be of llr"),
        (vcf, ["--methods", "head"], "no head"),
        (vcf, ["--window", "999"], "window must be in"),
        (vcf, ["--strand", "up"], "both, forward"),
        (tmp_path / "none.vcf", [], "There is no file"),
        (vcf, ["--model", tuned, "--methods", "llr"], "language-model head"),
        (vcf, ["--out", tmp_path / "foreign.vcf"], "replace it with --overwrite"),
        (vcf, ["--out", tmp_path / "foreign.vcf" / "o.vcf"], "can't be written"),
        (vcf, ["--out", tmp_path / "o.bcf"], "must end in one of .vcf.gz"),
        (vcf, ["--genome", protein], "no nucleotide"),
        (vcf, ["--shard", "3/2"], "1 <= i <= n"),
        (written(names + f"20\t5\t.\t{'A' if contig[4] != 'A' else 'C'}\tG\n"), [], "Is it the right assembly?"),
    ):
        code, said = run(*model, "--vcf", vcf_path, *inputs, *more)
        assert (code, message in said.err) == (2, True), said.err
    beyond = written(names + f"20\t401\t.\tA\tC\n20\t2\t.\t{contig[1]}\t{contig[1]}A\n")
    code, said = run(*model, "--vcf", beyond, *inputs, "--json")
    assert (code, json.loads(said.out)["alleles"]) == (0, {"beyond_contig": 1, "scored": 1})
    # Sites alone, no contig lines, gzip that is no BGZF: all of it is read.
    plain_gzip = tmp_path / "plain.vcf.gz"
    plain_gzip.write_bytes(gzip.compress(beyond.read_bytes()))
    code, said = run(*model, "--vcf", plain_gzip, "--genome", genome, "--out", tmp_path / "o.vcf.gz", "--json")
    assert (code, json.loads(said.out)["alleles"]) == (0, {"beyond_contig": 1, "scored": 1})
    assert [r.columns[7].partition("=")[0] for r in Vcf(tmp_path / "o.vcf.gz")] == ["GENOSSM_LLR", "GENOSSM_LLR"]
