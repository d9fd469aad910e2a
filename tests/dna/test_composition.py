import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genossm.dna import alphabet
from genossm.dna.composition import divergence, gc_content, kmer_counts, reading_frames


def test_gc_leaves_out_n():
    assert gc_content(alphabet.from_text("GgCATNNN")) == pytest.approx(3 / 5)
    assert math.isnan(gc_content(alphabet.from_text("NN")))


@given(st.text("ACGTN", min_size=1, max_size=40), st.integers(1, 3))
def test_kmers_are_counted(text, k):
    words = Counter(text[i : i + k] for i in range(len(text) - k + 1) if "N" not in text[i : i + k])
    counts = kmer_counts(alphabet.from_text(text), k)
    assert counts.sum() == sum(words.values())
    for word, count in words.items():
        assert counts[int("".join(str("ACGT".index(base)) for base in word), 4)] == count


def test_impossible_k_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.12"):
        kmer_counts(alphabet.from_text("ACGT"), 13)


def test_divergence():
    one, other = np.array([3, 1, 0, 0]), np.array([0, 0, 2, 2])
    assert divergence(one, one) == 0
    assert divergence(one, other) == pytest.approx(1)
    assert divergence(one, one * 2 + other) == pytest.approx(divergence(one * 2 + other, one))


def plain_frames(text, at_least):
    """Every frame by hand: read on from each ATG that is not inside an open frame."""
    sizes = []
    for strand in (text, alphabet.reverse_complement_text(text)):
        for frame in range(3):
            codons = [strand[i : i + 3] for i in range(frame, len(strand) - 2, 3)]
            start = None
            for place, codon in enumerate(codons):
                if codon == "ATG" and start is None:
                    start = place
                elif codon in ("TAA", "TAG", "TGA") and start is not None:
                    sizes.append(place - start)
                    start = None
    return sum(size >= at_least for size in sizes), max(sizes, default=0)


@given(st.integers(0, 10_000), st.integers(0, 400))
def test_reading_frames(seed, length):
    codes = np.random.default_rng(seed).choice([7, 7, 8, 9, 10, 10, 11], length).astype(np.uint8)
    found = reading_frames(codes, at_least=3)
    assert (found.count, found.longest) == plain_frames(alphabet.to_text(codes), 3)
