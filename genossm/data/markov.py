"""Context models: what counting alone predicts, the line that a sequence model has to beat."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval

_PIECE = 1 << 16
"""Bases of a piece of what is counted of a large genome."""


def thinned(intervals: Sequence[Interval], most: int = 1 << 24) -> Sequence[Interval]:
    """Return intervals of at most `most` bases: these, or evenly spread pieces of them where they have more.

    An order of 8 has 65,536 contexts, which 16 M bases fill; counting a whole human genome nine times takes hours.
    """
    if sum(map(len, intervals)) <= most:
        return intervals
    pieces = [
        Interval(interval.chrom, start, min(start + _PIECE, interval.end))
        for interval in intervals
        for start in range(interval.start, interval.end, _PIECE)
    ]
    chosen = np.linspace(0, len(pieces) - 1, max(1, min(len(pieces), most // _PIECE))).round().astype(int)
    return [pieces[index] for index in chosen]


class MarkovModel:
    """P(base | the `left` bases before and the `right` bases after it), from counts over both strands.

    Each context's estimate is smoothed with `prior` pseudo-counts spread by the estimate of the context one base
    shorter (on the longer side), down to no context at all: Jelinek-Mercer interpolation with counts.

    Args:
        left, right: context bases; `right=0` is the Markov model of order `left`.
        prior: pseudo-counts of the shorter context.
    """

    def __init__(self, left: int, right: int = 0, prior: float = 4.0):
        if min(left, right) < 0 or left + right > 12:
            raise ValueError(f"left and right must be at least 0 and sum to at most 12; got {left} and {right}.")
        self.left, self.right, self.prior = left, right, prior
        self.counts_KV: npt.NDArray[np.int64] = np.zeros((4 ** (left + right), 4), np.int64)

    def fit(self, genome: Genome, intervals: Iterable[Interval]) -> "MarkovModel":
        """Count both strands of the intervals; windows with an N are skipped."""
        for interval in intervals:
            codes = genome.fetch(interval)
            for strand in (codes, alphabet.reverse_complement(codes)):
                context, base = self._contexts(strand)
                flat = np.bincount(context * 4 + base, minlength=self.counts_KV.size)
                self.counts_KV += flat.reshape(self.counts_KV.shape)
        return self

    def bits(self, genome: Genome, intervals: Iterable[Interval]) -> float:
        """Return the mean bits per base of the intervals' forward strand, over bases with a whole context."""
        log2_KV = np.log2(self.probabilities())
        total, count = 0.0, 0
        for interval in intervals:
            context, base = self._contexts(genome.fetch(interval))
            total -= float(log2_KV[context, base].sum())
            count += len(base)
        return total / count if count else math.nan

    def probabilities(self) -> npt.NDArray[np.float64]:
        """Return P(base | context), one row a context, the base farthest to the left most significant."""
        counts = self.counts_KV.reshape((4,) * (self.left + self.right + 1)).astype(np.float64)
        left, right = self.left, self.right
        levels = [counts]
        dropped: list[int] = []
        while left + right:
            # The outermost base of the longer side goes first; axes are left..., right..., base.
            axis = 0 if left >= right else levels[-1].ndim - 2
            left, right = (left - 1, right) if axis == 0 else (left, right - 1)
            levels.append(levels[-1].sum(axis=axis))
            dropped.append(axis)
        total = levels[-1] + 1.0
        estimate = total / total.sum()
        for level, axis in zip(reversed(levels[:-1]), reversed(dropped), strict=True):
            weighted = level + self.prior * np.expand_dims(estimate, axis)
            estimate = weighted / weighted.sum(-1, keepdims=True)
        return estimate.reshape(-1, 4)

    def _contexts(self, codes: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        ids = (codes & np.uint8(0x7F)).astype(np.int64) - alphabet.A
        width = self.left + 1 + self.right
        if len(ids) < width:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        count = len(ids) - width + 1
        context = np.zeros(count, np.int64)
        whole = np.ones(count, bool)
        for offset in range(width):
            base = ids[offset : offset + count]
            whole &= (base >= 0) & (base < 4)
            if offset != self.left:
                context = context * 4 + base
        return context[whole], ids[self.left : self.left + count][whole]
