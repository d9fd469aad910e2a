"""Labelled sequences: what every labelled data set gives, whatever file it comes from, and how kinds are told apart."""

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genossm.data.base import SPLITS
from genossm.dna.interval import Interval

logger = logging.getLogger(__name__)

KINDS = ("binary", "multiclass", "multilabel", "regression", "per_base", "tracks")
MOST_CLASSES = 50
"""Whole-number labels with more distinct values than this are read as a regression target."""
SEPARATORS = (";", "|", ",")
"""What stands between the labels of one multilabel cell."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is predicted for a sequence.

    Raises:
        ValueError: an unknown kind, or too few names for it.
    """

    kind: str
    """One of `KINDS`; "binary" and "multiclass" choose one name a sequence, "per_base" one a base."""
    names: tuple[str, ...]
    """Names of the classes, labels, values or tracks, in the order of the model's outputs."""
    bin: int = 1
    """Bases that share one value of a track."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if self.kind in ("binary", "multiclass", "per_base") and len(self.names) < 2:
            raise ValueError(f"A {self.kind} target needs at least two classes; there is only {self.names}.")
        if self.kind == "binary" and len(self.names) != 2:
            raise ValueError(f"A binary target has two classes; got {', '.join(self.names)}.")
        if not self.names or self.bin < 1:
            raise ValueError(f"A target needs a name for each output and bin >= 1; got {self.names}, {self.bin}.")

    @property
    def chooses(self) -> bool:
        """Whether one of several classes is chosen (softmax), for the sequence or for each base."""
        return self.kind in ("binary", "multiclass", "per_base")

    @property
    def along(self) -> bool:
        """Whether there is a prediction for each base or bin instead of one for the sequence."""
        return self.kind in ("per_base", "tracks")


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence and what is known of it.

    The target is a class index; a tuple of 0/1 or of values for multilabel and regression; an array of class indices
    (one a base) or of values (bins, tracks) for targets along the sequence.
    """

    sequence: str
    target: Any
    interval: Interval | None = None
    name: str = ""


@dataclass(kw_only=True)
class Labelled:
    """A data set in memory: its target and the examples of each split.

    Raises:
        ValueError: a sequence is empty, or a class of the test split is not in train.
    """

    target: Target
    splits: dict[str, list[Example]]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    """What was left out or changed on the way, for the user."""

    def __post_init__(self) -> None:
        for split in SPLITS:
            for number, example in enumerate(self.splits.setdefault(split, [])):
                if not example.sequence:
                    raise ValueError(f"{self.title}: {split} row {number} ({example.name}) has a sequence of length 0.")
        if not self.splits["train"]:
            raise ValueError(f"{self.title}: there is no training example.")
        if self.target.kind in ("binary", "multiclass"):
            self._check_classes()

    def _check_classes(self) -> None:
        counts = {split: Counter(e.target for e in rows) for split, rows in self.splits.items()}
        names = self.target.names
        if len(counts["train"]) < 2:
            raise ValueError(
                f"{self.title}: all training examples are of class {names[next(iter(counts['train']))]!r}; a"
                " classifier needs at least two classes."
            )
        for split in ("val", "test"):
            unseen = sorted(names[c] for c in counts[split] if c not in counts["train"])
            if unseen:
                raise ValueError(
                    f"{self.title}: class {', '.join(unseen)} is in {split} but not in train, which has"
                    f" {', '.join(names[c] for c in sorted(counts['train']))}. Remove those rows or divide anew."
                )

    def describe(self) -> str:
        """Return one line for the user: kind, names, rows and lengths."""
        lengths = sorted(len(e.sequence) for rows in self.splits.values() for e in rows)
        rows = ", ".join(f"{len(self.splits[s]):,} {s}" for s in SPLITS)
        names = ", ".join(self.target.names[:8]) + (", …" if len(self.target.names) > 8 else "")
        return f"{self.title}: {self.target.kind} ({names}); {rows}; {lengths[0]}-{lengths[-1]} bp"


class LabelledData(ABC):
    """A labelled data set: a frozen, keyword-only dataclass whose `load` reads its files."""

    @abstractmethod
    def load(self) -> Labelled:
        """Read, check and return the data set.

        Raises:
            FileNotFoundError: a file is missing; the message says how to get it.
            ValueError: what a file holds is wrong; the message names the row.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, path: Path) -> "LabelledData":
        """Write a miniature in the real on-disk format to a folder and return the data set that reads it."""


def infer_kind(labels: Mapping[str, Sequence[str]], lengths: Sequence[int]) -> str:
    """Tell what kind of target label columns hold.

    Args:
        labels: text of each label column, none missing.
        lengths: length of each row's sequence in bp.

    Several columns are multilabel where they hold 0 and 1 alone, else regression. One column is per_base where each
    cell is as long as its sequence, multilabel where cells hold `;`, `|` or `,`, a choice of classes where it holds
    words or at most `MOST_CLASSES` whole numbers, else regression.
    """
    columns = list(labels.values())
    if len(columns) > 1:
        return "multilabel" if {v for column in columns for v in column} <= {"0", "1"} else "regression"
    cells = columns[0]
    # One base a row can't tell a label of the base from a label of the sequence; the latter is meant.
    if max(lengths) > 1 and all(len(cell) == length for cell, length in zip(cells, lengths, strict=True)):
        return "per_base"
    distinct = set(cells)
    numbers = [number_of(cell) for cell in distinct]
    if any(math.isnan(n) for n in numbers):
        if any(mark in cell for cell in distinct for mark in SEPARATORS):
            return "multilabel"
        return "binary" if len(distinct) <= 2 else "multiclass"
    if all(n.is_integer() for n in numbers) and len(distinct) <= MOST_CLASSES:
        return "binary" if len(distinct) <= 2 else "multiclass"
    return "regression"


def number_of(text: str) -> float:
    """Return the finite number that a text spells, or NaN where it spells none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def parse_targets(
    labels: Mapping[str, Sequence[str]], kind: str, names: Sequence[str] | None = None, where: str = "table"
) -> tuple[Target, list[Any]]:
    """Turn the text of label columns into targets.

    Args:
        labels: text of each label column.
        kind: what they hold, one of `KINDS` except "tracks".
        names: classes or labels in the order of the outputs; None sorts those that occur (numbers as numbers).
        where: what messages call the source.

    Raises:
        ValueError: a cell does not fit the kind or names; the message gives its row, counted from 0.
    """
    columns = list(labels.values())
    if kind == "regression" or (kind == "multilabel" and len(columns) > 1):
        values = np.array([[number_of(cell) for cell in column] for column in columns]).T
        bad = np.argwhere(np.isnan(values) if kind == "regression" else ~np.isin(values, (0, 1)))
        if len(bad):
            row, column = bad[0]
            wanted = "a finite number" if kind == "regression" else "0 or 1"
            raise ValueError(f"{where}, row {row}: label {columns[column][row]!r} is not {wanted}, as {kind} needs.")
        return Target(kind=kind, names=tuple(labels)), [tuple(row) for row in values.tolist()]
    cells = columns[0]
    if kind == "multilabel":
        parts = [_separate(cell) for cell in cells]
        order = tuple(names) if names else in_order({p for cell in parts for p in cell})
        _refuse_unknown([part for cell in parts for part in cell], order, where)
        return Target(kind=kind, names=order), [tuple(float(n in cell) for n in order) for cell in parts]
    if kind == "per_base":
        order = tuple(names) if names else in_order(set().union(*map(set, cells)))
        _refuse_unknown([letter for cell in cells for letter in set(cell)], order, where)
        index = {name: i for i, name in enumerate(order)}
        return Target(kind=kind, names=order), [np.array([index[c] for c in cell], np.uint8) for cell in cells]
    order = tuple(names) if names else in_order(set(cells))
    _refuse_unknown(cells, order, where)
    if len(order) < 2:
        raise ValueError(f"{where}: every label is {order[0]!r}; a classifier needs at least two classes.")
    index = {name: i for i, name in enumerate(order)}
    return Target(kind=kind, names=order), [index[cell] for cell in cells]


def in_order(names: set[str]) -> tuple[str, ...]:
    """Return class names in their fixed order: numbers by value, else by name, never as a folder lists them."""
    if all(not math.isnan(number_of(name)) for name in names):
        return tuple(sorted(names, key=lambda name: (number_of(name), name)))
    return tuple(sorted(names))


def _separate(cell: str) -> set[str]:
    for mark in SEPARATORS[1:]:
        cell = cell.replace(mark, SEPARATORS[0])
    return {part.strip() for part in cell.split(SEPARATORS[0]) if part.strip()}


def _refuse_unknown(cells: Sequence[str], names: Sequence[str], where: str) -> None:
    unknown = sorted(set(cells) - set(names))
    if unknown:
        raise ValueError(f"{where}: label {', '.join(map(repr, unknown[:8]))} is none of {', '.join(names)}.")
