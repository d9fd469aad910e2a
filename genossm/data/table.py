"""Your own labelled data: a table of sequences, or of intervals of a genome, with labels or signal tracks."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genossm.data import rows
from genossm.data.examples import Example, Labelled, LabelledData, Target, infer_kind, parse_targets
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import SPLIT_NAMES, Interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Table(LabelledData):
    """A labelled table: CSV, TSV or Parquet, FASTA with labels in its headers, BED, or a folder with a file a split.

    Columns are found under their usual names (`sequence`/`seq`, `label`/`class`, `split`, `chrom start end strand`).
    """

    table: str | None
    """File, or folder with train.*, val.* (or dev.*) and test.*."""
    label: str | Sequence[str] | None = None
    """Column or columns to predict; None takes the one called label, target or class."""
    fasta: str | None = None
    """Genome that the intervals are cut from, where the table has no sequences."""
    length: int | None = None
    """Bases cut around the middle of each interval instead of the interval itself."""
    kind: str | None = None
    """One of `KINDS`; None infers it and says so."""
    classes: Sequence[str] | None = None
    """Classes in the order of the outputs; None sorts those that occur."""
    bigwig: str | Sequence[str] | None = None
    """bigWig file or files whose signal over each interval is the target (needs pybigtools)."""
    bin: int = 1
    """Bases that share one value of a track: its mean."""

    def load(self) -> Labelled:
        """Read, check and return the table."""
        if self.table is None:
            raise ValueError("Give your labels with data.table=my.csv (or .tsv, .parquet, .fna, .bed, or a folder).")
        path = Path(self.table).expanduser()
        columns = rows.read_splits(path) if path.is_dir() else rows.read_columns(path)
        where = str(self.table)
        notes: list[str] = []
        sequences = rows.find(columns, "sequence")
        intervals = self._intervals(columns, where)
        if sequences is None:
            sequences, intervals, columns = self._cut(columns, intervals, where, notes)
        for row, text in enumerate(sequences):
            if not text:
                raise ValueError(f"{where}, row {row}: the sequence has length 0.")
        if self.bigwig is not None:
            target, targets = self._tracks(intervals, where)
        else:
            labels = self._labels(columns, where)
            kind = self.kind or infer_kind(labels, [len(s) for s in sequences])
            target, targets = parse_targets(labels, kind, self.classes, where)
        if self.kind is None:
            notes.append(f"target read as {target.kind}; set data.kind to choose another")
        splits = self._split(columns, len(sequences), where)
        found: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        names = rows.find(columns, "name") or [""] * len(sequences)
        for row, sequence in enumerate(sequences):
            if target.kind == "per_base" and len(targets[row]) != len(sequence):
                raise ValueError(
                    f"{where}, row {row}: {len(targets[row])} labels for {len(sequence)} bases; per_base needs one a"
                    " base."
                )
            interval = intervals[row] if intervals else None
            found[splits[row]].append(Example(sequence, targets[row], interval, names[row]))
        return Labelled(target=target, splits=found, title=path.name, notes=notes)

    def _labels(self, columns: rows.Columns, where: str) -> dict[str, list[str]]:
        wanted = [self.label] if isinstance(self.label, str) else list(self.label or ())
        if not wanted:
            found = rows.find(columns, "label")
            if found is None:
                raise ValueError(
                    f"{where} has no column called label, target or class; it has {', '.join(columns)}. Name yours with"
                    " data.label."
                )
            wanted = [name for name, cells in columns.items() if cells is found]
        for name in wanted:
            if name not in columns:
                raise ValueError(f"{where} has no column {name!r}; it has {', '.join(columns)}.")
            rows.refuse_missing(columns[name], f"label in {name!r}", where)
        return {name: columns[name] for name in wanted}

    def _intervals(self, columns: rows.Columns, where: str) -> list[Interval]:
        chrom, start, end = (rows.find(columns, name) for name in ("chrom", "start", "end"))
        if chrom is None or start is None or end is None:
            return []
        strands = rows.find(columns, "strand") or ["+"] * len(chrom)
        cells = zip(chrom, start, end, strands, strict=True)
        return [interval_of(*row, f"{where}, row {number}") for number, row in enumerate(cells)]

    def _cut(
        self, columns: rows.Columns, intervals: list[Interval], where: str, notes: list[str]
    ) -> tuple[list[str], list[Interval], rows.Columns]:
        if not intervals:
            raise ValueError(
                f"{where} has neither a sequence column nor chrom, start and end; it has {', '.join(columns)}."
            )
        if self.fasta is None:
            raise ValueError(f"{where} holds intervals; give the genome that they are cut from with data.fasta.")
        genome = Genome(self.fasta)
        kept: list[int] = []
        cut: list[str] = []
        placed: list[Interval] = []
        missing: dict[str, int] = {}
        for row, interval in enumerate(intervals):
            wide = widen(interval, self.length) if self.length else interval
            size = genome.size(interval.chrom)
            if size is None:
                missing[interval.chrom] = missing.get(interval.chrom, 0) + 1
                continue
            if wide is None or wide.end > size:
                raise ValueError(
                    f"{where}, row {row}: {wide or interval} reaches beyond its contig of {size} bp. Is it from another"
                    " assembly, or data.length too large?"
                )
            kept.append(row)
            placed.append(wide)
            cut.append(alphabet.to_text(genome.fetch(wide)))
        if not cut:
            raise ValueError(
                f"{where}: none of its contigs ({', '.join(missing)}) is in {self.fasta}, which has"
                f" {', '.join(list(genome.contigs)[:8])}."
            )
        if missing:
            notes.append("rows on contigs that the genome lacks: " + ", ".join(f"{k} {v}" for k, v in missing.items()))
        return cut, placed, {name: [cells[i] for i in kept] for name, cells in columns.items()}

    def _tracks(self, intervals: list[Interval], where: str) -> tuple[Target, list[Any]]:
        from genossm.ops.backend import installed

        if not installed("pybigtools"):
            raise ValueError("data.bigwig needs pybigtools: pip install 'genossm[io]'.")
        if not intervals:
            raise ValueError(f"{where} has no chrom, start and end, which data.bigwig needs.")
        paths = [self.bigwig] if isinstance(self.bigwig, str) else list(self.bigwig or ())
        tracks = [_read_track(path, intervals, self.bin) for path in paths]
        names = tuple(Path(path).stem for path in paths)
        return Target(kind="tracks", names=names, bin=self.bin), [
            np.stack(values, axis=1) for values in zip(*tracks, strict=True)
        ]

    def _split(self, columns: rows.Columns, count: int, where: str) -> list[str]:
        given = rows.find(columns, "split")
        if given is None:
            return ["train"] * count
        splits = [SPLIT_NAMES.get(word.strip().lower(), "") for word in given]
        if "" in splits:
            row = splits.index("")
            raise ValueError(f"{where}, row {row}: split {given[row]!r} is none of {', '.join(SPLIT_NAMES)}.")
        return splits

    @classmethod
    def tiny(cls, path: Path) -> "Table":
        """Write a table in which label 1 means GC-rich, with a split column."""
        rng = random.Random(0)
        path.mkdir(parents=True, exist_ok=True)
        file = path / "tiny.csv"
        with file.open("w") as handle:
            handle.write("sequence,label,split\n")
            for i in range(60):
                letters = "GGCCA" if i % 2 else "AATTC"
                sequence = "".join(rng.choices(letters, k=24 + i % 9))
                handle.write(f"{sequence},{i % 2},{('train', 'train', 'train', 'val', 'test')[i // 2 % 5]}\n")
        return cls(table=str(file))


def interval_of(chrom: str, start: str, end: str, strand: str, where: str) -> Interval:
    """Return the interval that cells of text spell; a strand other than "-" is forward.

    Raises:
        ValueError: start or end is no number, or start is not before end; the message begins with `where`.
    """
    try:
        return Interval(chrom, int(start), int(end), "-" if strand == "-" else "+")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def widen(interval: Interval, length: int) -> Interval | None:
    """Return `length` bp about the middle of an interval, or None where that begins before the contig."""
    start = (interval.start + interval.end - length) // 2
    return Interval(interval.chrom, start, start + length, interval.strand) if start >= 0 else None


def _read_track(path: str, intervals: Sequence[Interval], width: int) -> list[Any]:
    """Return the mean signal of each bin of each interval; bases without a value count as 0."""
    import pybigtools

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r}.")
    values: list[Any] = []
    with pybigtools.open(path) as track:
        sizes = track.chroms()
        for row, interval in enumerate(intervals):
            if len(interval) % width:
                raise ValueError(f"Row {row}: {len(interval)} bp can't be divided into bins of {width}; set data.bin.")
            if interval.chrom not in sizes or interval.end > sizes[interval.chrom]:
                raise ValueError(f"Row {row}: {interval} does not lie in {path}, which has {', '.join(sizes)}.")
            signal = np.asarray(
                track.values(interval.chrom, interval.start, interval.end, fillna=0.0, oob=0.0), np.float32
            )
            means = np.nan_to_num(signal).reshape(-1, width).mean(1)
            values.append(means[::-1].copy() if interval.strand == "-" else means)
    return values
