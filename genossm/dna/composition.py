"""What a stretch of DNA is made of: GC content, k-mer spectrum, open reading frames."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes

_STOPS = ("TAA", "TAG", "TGA")
_START = "ATG"


@dataclass(frozen=True)
class ReadingFrames:
    """Open reading frames of both strands, from ATG to the first stop in frame: their number and the longest."""

    count: int
    longest: int
    """Codons of the longest, its stop not counted."""


def gc_content(codes: Bytes) -> float:
    """Return the share of G and C among the bases A, C, G and T; NaN where there is none."""
    counts = np.bincount(codes & 0x7F, minlength=alphabet.N + 1)[alphabet.A : alphabet.N]
    return float((counts[1] + counts[2]) / counts.sum()) if counts.sum() else float("nan")


def kmer_counts(codes: Bytes, k: int) -> npt.NDArray[np.int64]:
    """Return how often each of the 4^k k-mers occurs, in the order of the alphabet; those with N are left out.

    Raises:
        ValueError: k is below 1 or above 12.
    """
    if not 1 <= k <= 12:
        raise ValueError(f"k must be in 1..12; got {k}.")
    digits = (codes & 0x7F).astype(np.int64) - alphabet.A
    size = len(digits) - k + 1
    if size < 1:
        return np.zeros(4**k, dtype=np.int64)
    words = np.zeros(size, dtype=np.int64)
    real = np.ones(size, dtype=bool)
    for offset in range(k):
        piece = digits[offset : offset + size]
        words = words * 4 + piece
        real &= (piece >= 0) & (piece < 4)
    return np.bincount(words[real], minlength=4**k)


def divergence(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    """Return the Jensen-Shannon divergence of two spectra, in bits: 0 for equal ones, 1 for disjoint ones."""
    p, q = (counts / max(1, counts.sum()) for counts in (one, other))
    middle = (p + q) / 2
    total = 0.0
    for share in (p, q):
        some = share > 0
        total += float((share[some] * np.log2(share[some] / middle[some])).sum()) / 2
    return max(0.0, total)


def reading_frames(codes: Bytes, at_least: int = 30) -> ReadingFrames:
    """Find the open reading frames of all six frames.

    Args:
        codes: stored bases.
        at_least: codons, start included and stop not, from which a frame counts.
    """
    count = longest = 0
    for strand in (codes, alphabet.reverse_complement(codes)):
        digits = (strand & 0x7F).astype(np.int64) - alphabet.A
        for frame in range(3):
            usable = (len(digits) - frame) // 3 * 3
            codons = digits[frame : frame + usable].reshape(-1, 3) @ np.array([25, 5, 1])
            stops = np.flatnonzero(np.isin(codons, [_word(stop) for stop in _STOPS]))
            starts = np.flatnonzero(codons == _word(_START))
            # The stop that ends each start's frame; of the starts with the same one, the first is the longest.
            ends = np.searchsorted(stops, starts)
            closed = ends < len(stops)
            which, first = np.unique(ends[closed], return_index=True)
            sizes = stops[which] - starts[closed][first]
            count += int((sizes >= at_least).sum())
            longest = max(longest, int(sizes.max(initial=0)))
    return ReadingFrames(count, longest)


def _word(codon: str) -> int:
    # Base 5, so that N (digit 4) makes words that no codon of the four bases has.
    return sum("ACGT".index(base) * 5 ** (2 - place) for place, base in enumerate(codon))
