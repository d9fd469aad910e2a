"""Intervals on contigs: 0-based, half-open, everywhere in genossm."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from genossm.files import open_text

SPLIT_NAMES = {
    "train": "train",
    "valid": "val",
    "val": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """`[start, end)` on a contig, 0-based; `strand` "-" means that the reverse complement is meant."""

    chrom: str
    start: int
    end: int
    strand: str = "+"

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise ValueError(
                f"An interval needs 0 <= start < end; got {self.chrom}:{self.start}-{self.end} (0-based, half-open)."
            )
        if self.strand not in ("+", "-", "."):
            raise ValueError(f"A strand is '+', '-' or '.'; got {self.strand!r}.")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.chrom}:{self.start}-{self.end}"

    def overlaps(self, other: "Interval") -> bool:
        """Tell whether the two share at least one base."""
        return self.chrom == other.chrom and self.start < other.end and other.start < self.end


@dataclass(frozen=True, slots=True)
class BedRow:
    """One line of a BED file: the interval, the columns after the third, and its 1-based line number."""

    interval: Interval
    fields: tuple[str, ...]
    line: int


def read_bed(path: str | Path) -> list[BedRow]:
    """Read a BED file (plain or gzip): chrom, start, end and any further columns, tab- or space-separated.

    Lines that start with `#`, `track` or `browser` and a header line whose second column is no number are skipped.
    The strand is read from column 6 where it is `+` or `-`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has fewer than three columns or an impossible interval; the message names the line.
    """
    rows: list[BedRow] = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            if not text or text.startswith(("#", "track", "browser")):
                continue
            columns = text.split("\t") if "\t" in text else text.split()
            if len(columns) < 3:
                raise ValueError(
                    f"{path}, line {number}: a BED line needs at least chrom, start and end; got {text[:80]!r}."
                )
            if not rows and not columns[1].isdigit() and re.search("[a-z]", columns[1], re.IGNORECASE):
                continue
            strand = columns[5] if len(columns) > 5 and columns[5] in ("+", "-") else "+"
            try:
                interval = Interval(columns[0], int(columns[1]), int(columns[2]), strand)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            rows.append(BedRow(interval, tuple(columns[3:]), number))
    if not rows:
        raise ValueError(f"{path} holds no interval.")
    return rows


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Sort and join intervals that overlap or touch; strands are dropped."""
    merged: list[Interval] = []
    for interval in sorted(Interval(i.chrom, i.start, i.end) for i in intervals):
        last = merged[-1] if merged else None
        if last is not None and last.chrom == interval.chrom and interval.start <= last.end:
            merged[-1] = Interval(last.chrom, last.start, max(last.end, interval.end))
        else:
            merged.append(interval)
    return merged


def first_overlap(a: Sequence[Interval], b: Sequence[Interval]) -> tuple[Interval, Interval] | None:
    """Return one pair of intervals, one of `a` and one of `b`, that share a base, or None."""
    events = sorted([(i.chrom, i.start, i.end, 0, i) for i in a] + [(i.chrom, i.start, i.end, 1, i) for i in b])
    furthest: dict[int, Interval] = {}
    for _, _, _, side, interval in events:
        other = furthest.get(1 - side)
        if other is not None and other.overlaps(interval):
            return (interval, other) if side == 0 else (other, interval)
        mine = furthest.get(side)
        if mine is None or mine.chrom != interval.chrom or mine.end < interval.end:
            furthest[side] = interval
    return None


def lengths(intervals: Sequence[Interval]) -> npt.NDArray[np.int64]:
    """Return the length of each interval in bp."""
    return np.fromiter((len(i) for i in intervals), dtype=np.int64, count=len(intervals))
