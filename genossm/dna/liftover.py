"""Coordinates of one assembly in another: a constant offset, or the blocks of a UCSC chain file."""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from genossm.dna.interval import Interval
from genossm.files import open_text


class Lift(Protocol):
    """Something that places an interval in another assembly."""

    def __call__(self, interval: Interval) -> Interval | None:
        """Return the interval there, or None where it has no place of the same length."""
        ...


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Every position of some contigs moves by the same number of bases."""

    by: int
    """Bases that are added."""
    chrom: str | None = None
    """Contig that it applies to, by its name there; None applies to all."""

    def __call__(self, interval: Interval) -> Interval | None:
        if self.chrom is not None and interval.chrom != self.chrom:
            return None
        start = interval.start + self.by
        return Interval(interval.chrom, start, start + len(interval), interval.strand) if start >= 0 else None


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    end: int
    chrom: str
    there: int
    """Start of the block there, on the strand that the chain aligns."""
    size: int
    """Length of the contig there."""
    reverse: bool


class Chain:
    """The aligned blocks of a chain file (UCSC), from its reference (target) to its query assembly.

    An interval is lifted where both its ends lie in blocks of one chain and their distance is kept: a gap inside is
    allowed if it is as long on both sides. Where chains overlap, the one with the higher score is taken.

    Args:
        path: chain file, plain or gzip.

    Raises:
        ValueError: a line is none of a chain file; the message gives its number.
    """

    def __init__(self, path: str | Path):
        self._chains: dict[str, list[list[_Block]]] = {}
        scored: list[tuple[float, str, list[_Block]]] = []
        header: list[str] = []
        at = there = 0
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                words = line.split()
                if not words or words[0].startswith("#"):
                    continue
                try:
                    if words[0] == "chain":
                        header = words
                        at, there = int(words[5]), int(words[10])
                        scored.append((float(words[1]), words[2], []))
                        continue
                    size, *gaps = map(int, words)
                    reverse = header[9] == "-"
                    scored[-1][2].append(_Block(at, at + size, header[7], there, int(header[8]), reverse))
                    at += size + (gaps[0] if gaps else 0)
                    there += size + (gaps[1] if gaps else 0)
                except (ValueError, IndexError):
                    raise ValueError(
                        f"{path}, line {number}: {line.strip()[:60]!r} is no line of a chain file."
                    ) from None
        if not scored:
            raise ValueError(f"{path} holds no chain.")
        for _, chrom, blocks in sorted(scored, key=lambda chain: -chain[0]):
            self._chains.setdefault(chrom, []).append(blocks)

    def __call__(self, interval: Interval) -> Interval | None:
        names = {interval.chrom, interval.chrom.removeprefix("chr"), f"chr{interval.chrom}"}
        for name in sorted(names & self._chains.keys()):
            for blocks in self._chains[name]:
                lifted = _lift(blocks, interval)
                if lifted is not None:
                    return lifted
        return None


def _lift(blocks: list[_Block], interval: Interval) -> Interval | None:
    first = _block_at(blocks, interval.start)
    last = _block_at(blocks, interval.end - 1)
    if first is None or last is None:
        return None
    start = first.there + interval.start - first.start
    end = last.there + interval.end - last.start
    if end - start != len(interval):
        return None
    if not first.reverse:
        return Interval(first.chrom, start, end, interval.strand)
    flipped = "+" if interval.strand == "-" else "-"
    return Interval(first.chrom, first.size - end, first.size - start, flipped)


def _block_at(blocks: list[_Block], position: int) -> _Block | None:
    place = bisect_right(blocks, position, key=lambda block: block.start) - 1
    return blocks[place] if place >= 0 and position < blocks[place].end else None
