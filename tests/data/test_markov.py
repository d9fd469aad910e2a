import pytest

from genossm.data.markov import MarkovModel, thinned
from genossm.dna.interval import Interval


def test_small_splits_are_counted_whole():
    intervals = [Interval("one", 5, 900), Interval("two", 0, 100)]
    assert thinned(intervals, 995) is intervals


def test_large_splits_are_counted_in_pieces_spread_over_all():
    intervals = [Interval("one", 10, 10 + (1 << 20)), Interval("two", 0, 1 << 20)]
    pieces = thinned(intervals, 1 << 18)
    assert sum(map(len, pieces)) <= 1 << 18
    assert {piece.chrom for piece in pieces} == {"one", "two"}
    assert all(10 <= piece.start < piece.end <= 10 + (1 << 20) for piece in pieces if piece.chrom == "one")
    assert len(set(pieces)) == len(pieces) == 4


def test_pieces_count_nearly_as_the_whole(chr20):
    (name,) = chr20.contigs
    whole = [Interval(name, 0, chr20.contigs[name])]
    some = thinned(whole, 1 << 19)
    bits = [MarkovModel(3).fit(chr20, part).bits(chr20, whole) for part in (whole, some)]
    assert bits[1] == pytest.approx(bits[0], abs=0.01)
