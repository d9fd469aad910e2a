"""Leaks are found, counted by class, and can be removed."""

from pathlib import Path

import pytest

from genossm.data.examples import Example, Target
from genossm.data.genomic_benchmarks import TASKS, read_intervals
from genossm.data.leakage import drop_leaks, find_leaks
from genossm.dna.interval import Interval

BINARY = Target(kind="binary", names=("n", "p"))
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "tasks" / "genomic_benchmarks_intervals"


def row(start, end, target=0, sequence="", chrom="1"):
    return Example(sequence, target, Interval(chrom, start, end))


def test_each_leak_is_counted():
    train = [row(100, 200), row(500, 600), row(100, 900, chrom="2")]
    test = [row(100, 200), row(151, 251), row(149, 249), row(300, 400, 1, chrom="3"), row(850, 949, 1, chrom="2")]
    negative, positive = find_leaks(train, test, BINARY)
    assert (negative.rows, negative.identical, negative.overlapped, negative.same_contig) == (3, 1, 2, 3)
    assert (positive.rows, positive.identical, positive.overlapped, positive.same_contig) == (2, 0, 1, 1)
    assert "1 of 3 identical to a train row (33.3 %)" in str(negative)


def test_sequences_alone_are_compared_on_both_strands():
    train = [Example("AACG", 0), Example("TTTT", 1)]
    test = [Example("cgtt", 0), Example("AAAA", 1), Example("ACGA", 1)]
    negative, positive = find_leaks(train, test, BINARY)
    assert (negative.identical, positive.identical, positive.overlapped) == (1, 1, None)


def test_leaks_are_removed():
    train, held = [row(100, 200)], [row(100, 200), row(120, 220), row(160, 260)]
    assert [len(drop_leaks(train, held, how)[0]) for how in ("none", "exact", "overlap")] == [3, 2, 1]
    with pytest.raises(ValueError, match="dedup must be one of"):
        drop_leaks(train, held, "some")


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published interval files are not part of the project")
@pytest.mark.parametrize(
    ("task", "name", "what", "count"),
    [
        ("human_enhancers_ensembl", "positive", "identical", 11_694),
        ("human_nontata_promoters", "negative", "overlapped", 4_086),
    ],
)
def test_published_leaks_are_found(task, name, what, count):
    rows = read_intervals(PUBLISHED / task, TASKS[task].classes)
    target = Target(kind="binary", names=TASKS[task].classes)
    splits = {
        split: [Example("", target.names.index(c), i) for s, c, _, i in rows if s == split]
        for split in ("train", "test")
    }
    leak = next(leak for leak in find_leaks(splits["train"], splits["test"], target) if leak.name == name)
    assert getattr(leak, what) == count
