"""What of a test split a model has seen in training: identical rows, overlapping intervals, the same contigs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genossm.data.examples import Example, Target
from genossm.dna import alphabet

DEDUP = ("none", "exact", "overlap")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """The leaks of one class of the test split."""

    name: str
    rows: int
    identical: int
    """Rows whose interval, or whose sequence on either strand, is also in train."""
    overlapped: int | None
    """Rows of which one train interval covers more than half; None where rows have no intervals."""
    same_contig: int | None
    """Rows on a contig that train rows lie on too; None likewise."""

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {self.identical:,} of {self.rows:,} identical to a train row ({self._share(self.identical)})"
        ]
        if self.overlapped is not None and self.same_contig is not None:
            parts.append(f"{self.overlapped:,} over half overlapped ({self._share(self.overlapped)})")
            parts.append(f"{self.same_contig:,} on a contig of train ({self._share(self.same_contig)})")
        return ", ".join(parts)

    def _share(self, count: int) -> str:
        return f"{100 * count / max(1, self.rows):.1f} %"


class TrainIndex:
    """Where the training rows are, so that others can be held against them.

    Args:
        rows: examples of the train split; of those with an empty sequence the interval alone is looked at.
    """

    def __init__(self, rows: Sequence[Example]):
        self.sequences = {sequence for row in rows if row.sequence for sequence in _both(row.sequence)}
        self.places = {(i.chrom, i.start, i.end) for row in rows if (i := row.interval) is not None}
        by_contig: dict[str, list[tuple[int, int]]] = {}
        for chrom, start, end in self.places:
            by_contig.setdefault(chrom, []).append((start, end))
        self.contigs = {chrom: np.array(sorted(found), np.int64) for chrom, found in by_contig.items()}
        self.longest = {chrom: int((a[:, 1] - a[:, 0]).max()) for chrom, a in self.contigs.items()}

    def identical(self, row: Example) -> bool:
        """Tell whether the row's interval, or its sequence on either strand, is one of train."""
        where = row.interval
        placed = where is not None and (where.chrom, where.start, where.end) in self.places
        return placed or (bool(row.sequence) and row.sequence.upper() in self.sequences)

    def overlapped(self, row: Example) -> bool:
        """Tell whether one train interval covers more than half of the row's."""
        where = row.interval
        if where is None or where.chrom not in self.contigs:
            return False
        found = self.contigs[where.chrom]
        low, high = np.searchsorted(found[:, 0], [where.start - self.longest[where.chrom], where.end])
        near = found[low:high]
        shared = np.minimum(near[:, 1], where.end) - np.maximum(near[:, 0], where.start)
        return bool((2 * shared > len(where)).any())


def find_leaks(train: Sequence[Example], test: Sequence[Example], target: Target) -> list[Leak]:
    """Return the leaks from train into each class of test, or into all of it where rows have no one class."""
    index = TrainIndex(train)
    groups: dict[str, list[Example]] = {}
    for row in test:
        name = target.names[row.target] if target.kind in ("binary", "multiclass") else "all"
        groups.setdefault(name, []).append(row)
    leaks: list[Leak] = []
    for name, rows in sorted(groups.items()):
        placed = all(row.interval is not None for row in rows) and bool(index.places)
        contigs = [row.interval.chrom in index.contigs for row in rows if row.interval is not None]
        leaks.append(
            Leak(
                name=name,
                rows=len(rows),
                identical=sum(map(index.identical, rows)),
                overlapped=sum(map(index.overlapped, rows)) if placed else None,
                same_contig=sum(contigs) if placed else None,
            )
        )
    return leaks


def drop_leaks(train: Sequence[Example], held: Sequence[Example], how: str) -> tuple[list[Example], list[Example]]:
    """Remove from held-out rows those that train gives away.

    Args:
        train: training rows, which stay.
        held: rows of val or test.
        how: "exact" removes identical rows, "overlap" those over half overlapped too, "none" none.

    Returns:
        Rows that stay and rows that go.

    Raises:
        ValueError: `how` is none of these.
    """
    if how not in DEDUP:
        raise ValueError(f"dedup must be one of {', '.join(DEDUP)}; got {how!r}.")
    if how == "none":
        return list(held), []
    index = TrainIndex(train)
    gone = [index.identical(row) or (how == "overlap" and index.overlapped(row)) for row in held]
    return [r for r, g in zip(held, gone, strict=True) if not g], [r for r, g in zip(held, gone, strict=True) if g]


def _both(sequence: str) -> tuple[str, str]:
    upper = sequence.upper()
    return upper, alphabet.reverse_complement_text(upper)
