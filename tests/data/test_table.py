"""Own labelled data: every format, every kind of target, and every mistake that people make in them."""

import gzip

import numpy as np
import pytest

from genossm.data.examples import Labelled, Target, infer_kind
from genossm.data.table import Table
from genossm.dna import alphabet
from genossm.dna.interval import Interval

ROWS = [("ACGT" * 3, "0"), ("GGCC" * 4, "1"), ("TTTTA", "0"), ("CCCAC", "1")]


def write(path, rows, header="sequence,label", mark=","):
    path.write_text("\n".join([header, *(mark.join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def load(tmp_path, rows, header="sequence,label", **options) -> Labelled:
    return Table(table=write(tmp_path / "t.csv", rows, header), **options).load()


def test_csv_tsv_parquet_and_gzip_read_the_same(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    csv = Table(table=write(tmp_path / "t.csv", ROWS)).load()
    tsv = Table(table=write(tmp_path / "t.tsv", ROWS, "seq\tclass", "\t")).load()
    parquet.write_table(
        pa.table({"sequence": [s for s, _ in ROWS], "label": [int(n) for _, n in ROWS]}), tmp_path / "t.parquet"
    )
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    for other in (tsv, Table(table=str(tmp_path / "t.parquet")).load(), Table(table=str(packed)).load()):
        assert other.splits == csv.splits
        assert other.target == csv.target == Target(kind="binary", names=("0", "1"))


def test_fasta_headers_hold_labels(tmp_path):
    (tmp_path / "train.fna").write_text(">a|12\nACG\nTT\n>b|3\nGGG\n")
    (tmp_path / "test.fna").write_text(">c|3\nTTT\n")
    data = Table(table=str(tmp_path)).load()
    assert data.target.names == ("3", "12")
    assert [(e.sequence, e.target) for e in data.splits["train"]] == [("ACGTT", 1), ("GGG", 0)]
    assert [e.target for e in data.splits["test"]] == [0]


def test_intervals_are_cut_from_the_genome(tmp_path, chr20):
    contig = next(iter(chr20.contigs))
    rows = [(contig, 100, 140, "+", "on"), (contig, 200, 240, "-", "off"), ("chrNone", 5, 45, "+", "on")]
    table = Table(
        table=write(tmp_path / "t.csv", rows, "chrom,start,end,strand,label"), fasta=str(chr20.paths[0])
    ).load()
    first, second = table.splits["train"]
    assert first.sequence == alphabet.to_text(chr20.codes(contig)[100:140])
    assert second.sequence == alphabet.to_text(alphabet.reverse_complement(chr20.codes(contig)[200:240]))
    assert second.interval == Interval(contig, 200, 240, "-")
    assert any("chrNone 1" in note for note in table.notes)


def test_bed_with_label_column_and_fixed_length(tmp_path, chr20):
    contig = next(iter(chr20.contigs))
    bed = tmp_path / "t.bed"
    bed.write_text(f"{contig}\t1000\t1010\ta\n{contig}\t2000\t2030\tb\n")
    data = Table(table=str(bed), fasta=str(chr20.paths[0]), length=64).load()
    assert {len(e.sequence) for e in data.splits["train"]} == {64}
    assert data.splits["train"][1].interval == Interval(contig, 1983, 2047)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ({"label": ["0", "1", "0"]}, "binary"),
        ({"label": ["a", "b", "c"]}, "multiclass"),
        ({"label": ["0", "2", "7"]}, "multiclass"),
        ({"label": ["0.5", "1", "2"]}, "regression"),
        ({"label": [str(i) for i in range(80)]}, "regression"),
        ({"label": ["a;b", "b", "c"]}, "multilabel"),
        ({"x": ["0", "1", "1"], "y": ["1", "1", "0"]}, "multilabel"),
        ({"x": ["0.1", "1", "1"], "y": ["1", "1", "0"]}, "regression"),
        ({"label": ["0110", "1000", "1111"]}, "per_base"),
    ],
)
def test_kind_is_inferred(labels, kind):
    count = len(next(iter(labels.values())))
    assert infer_kind(labels, [4] * count) == kind


def test_multilabel_regression_and_per_base_targets(tmp_path):
    assert [e.target for e in load(tmp_path, [("ACG", "b;a"), ("AC", "c")]).splits["train"]] == [(1, 1, 0), (0, 0, 1)]
    values = load(tmp_path, [("ACG", 1.5, 2), ("AC", -1, 3)], "sequence,x,y", label=["x", "y"])
    assert values.target == Target(kind="regression", names=("x", "y"))
    assert values.splits["train"][0].target == (1.5, 2.0)
    base = load(tmp_path, [("ACG", "iee"), ("AC", "ei")])
    assert base.target == Target(kind="per_base", names=("e", "i"))
    np.testing.assert_array_equal(base.splits["train"][0].target, [1, 0, 0])


def test_bigwig_tracks(tmp_path, chr20):
    pybigtools = pytest.importorskip("pybigtools", reason="the extra io is not installed")
    contig = next(iter(chr20.contigs))
    path = str(tmp_path / "signal.bw")
    writer = pybigtools.open(path, "w")
    writer.write({contig: chr20.contigs[contig]}, iter([(contig, 10, 14, 2.0), (contig, 20, 22, 4.0)]))
    table = write(tmp_path / "t.csv", [(contig, 8, 24, "+"), (contig, 8, 24, "-")], "chrom,start,end,strand")
    data = Table(table=table, fasta=str(chr20.paths[0]), bigwig=path, bin=4).load()
    forward, reverse = (e.target for e in data.splits["train"])
    np.testing.assert_allclose(forward[:, 0], [1, 1, 0, 2])
    np.testing.assert_allclose(reverse, forward[::-1])
    assert data.target == Target(kind="tracks", names=("signal",), bin=4)


@pytest.mark.parametrize(
    ("rows", "header", "options", "message"),
    [
        ([("ACG", "1"), ("AC", "1")], "sequence,label", {}, "at least two classes"),
        ([("ACG", "1"), ("AC", "")], "sequence,label", {}, "have no label"),
        ([("ACG", "1"), ("AC", "NaN")], "sequence,label", {}, "have no label"),
        ([("ACG", "1"), ("", "0")], "sequence,label", {}, "row 1: the sequence has length 0"),
        ([("ACG", "1", "train"), ("AC", "0", "train"), ("A", "2", "test")], "seq,label,split", {}, "not in train"),
        ([("ACG", "x"), ("AC", "0")], "sequence,label", {"kind": "regression"}, "'x' is not a finite number"),
        ([("ACG", "x"), ("AC", "y")], "sequence,label", {"classes": ["x", "z"]}, "'y' is none of x, z"),
        ([("ACG", "x"), ("AC", "y")], "sequence,label", {"kind": "word"}, "kind must be one of"),
        ([("ACG", "01"), ("AC", "10")], "sequence,label", {"kind": "per_base"}, "2 labels for 3 bases"),
        ([("ACG", "x", "early"), ("AC", "y", "test")], "sequence,label,split", {}, "'early' is none of"),
        ([("ACG", "x")], "sequence,label", {"label": "score"}, "no column 'score'; it has sequence, label"),
        ([("ACG", "x")], "sequence,kind", {}, "no column called label"),
        ([("ACG", "x")], "gene,label", {}, "neither a sequence column nor chrom, start and end"),
        ([("chr1", 5, 2, "x")], "chrom,start,end,label", {}, "0 <= start < end"),
        ([("chr1", 5, 9, "x")], "chrom,start,end,label", {}, "data.fasta"),
    ],
)
def test_mistakes_are_named(tmp_path, rows, header, options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        load(tmp_path, rows, header, **options)


def test_ragged_row_and_unknown_ending(tmp_path):
    (tmp_path / "t.csv").write_text("sequence,label\nACGT\n")
    with pytest.raises(ValueError, match="row 0: 1 cells where the header has 2"):
        Table(table=str(tmp_path / "t.csv")).load()
    (tmp_path / "t.xlsx").write_text("x")
    with pytest.raises(ValueError, match="unknown ending"):
        Table(table=str(tmp_path / "t.xlsx")).load()
    with pytest.raises(FileNotFoundError, match="no file"):
        Table(table=str(tmp_path / "none.csv")).load()
