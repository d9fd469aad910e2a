"""Comparisons along the length: what a longer one takes is foreseen from the shorter, so that none is run in vain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genossm.benchmarks.base import OUT_OF_MEMORY, Comparison

NOT_RUN = "not run"
"""How the place of a variant begins where the time did not reach."""
FAILED = "failed"
"""How it begins where the machine refused."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Point(Comparison):
    """One length of a series, whose name is the series and the length."""

    series: str
    length: int
    power: float = 1.0
    """Power of the length that the time grows with, at least."""
    largest: bool = False
    """Whether only the longest that runs is asked for."""


@dataclass(frozen=True)
class Foreseen:
    """What a point will take."""

    seconds: float
    """Of one run of the fastest variant; 0 where nothing is known."""
    mib: float
    """Peak above the inputs; 0 where nothing is known."""


def needless(point: Point, rows: Rows) -> bool:
    """Tell whether nothing is to be learnt: longer than what did not fit, or, of `largest`, shorter than what did."""
    for row in rows:
        series, length = place(row)
        if series != point.series:
            continue
        longer = point.length >= length
        if row["variant"] == OUT_OF_MEMORY and longer:
            return True
        if row["variant"].startswith(NOT_RUN) and (longer or point.largest):
            return True
        if point.largest and not longer and not math.isnan(row["seconds"]):
            return True
    return False


def foresee(point: Point, rows: Rows) -> Foreseen:
    """Return what a point will take: the time of the next shorter one, times the growth since the one before it."""
    known: dict[int, tuple[float, float]] = {}
    for row in rows:
        series, length = place(row)
        if series == point.series and length < point.length and not math.isnan(row["seconds"]):
            seconds, mib = known.get(length, (math.inf, 0.0))
            known[length] = min(seconds, row["seconds"]), max(mib, row["peak_mib"] or 0.0)
    if not known:
        return Foreseen(0.0, 0.0)
    *_, (length, (seconds, mib)) = sorted(known.items())
    power = point.power
    if len(known) > 1:
        (short, (less, _)), (long, (more, _)) = sorted(known.items())[-2:]
        power = max(power, math.log(more / less) / math.log(long / short))
    return Foreseen(seconds * (point.length / length) ** power, mib * point.length / length)


def place(row: Mapping[str, Any]) -> tuple[str, int]:
    """Return a row's series and length."""
    series, _, length = row["comparison"].rpartition(" ")
    return series, int(length)
