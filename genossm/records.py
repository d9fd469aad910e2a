"""What inference reads: sequences of a FASTA, intervals of a genome, rows of a table, or texts, one by one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval, read_bed
from genossm.jobs import identity_of_file

SEQUENCE_COLUMNS = ("sequence", "seq")


class Records(ABC):
    """Sequences with names and places; `columns` are carried into the output, one value a record."""

    names: list[str]
    lengths: npt.NDArray[np.int64]
    """Bases of each record."""
    columns: pa.Table | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def codes(self, record: int) -> Bytes:
        """Return a record as stored bases."""

    def place(self, record: int, start: int, end: int) -> Interval:
        """Return where `[start, end)` of a record lies, 0-based half-open: in the record, or on its contig."""
        return Interval(self.names[record], start, end)

    def release(self) -> None:
        """Let go of what reading left in memory; it is read again where it is needed."""
        return

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what distinguishes these records from others, for manifests."""


class FastaRecords(Records):
    """The sequences of FASTA files, memory-mapped."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.genome = Genome(path)
        contigs = self.genome.contigs
        self.names = list(contigs)
        self.lengths = np.array(list(contigs.values()), dtype=np.int64)

    def codes(self, record: int) -> Bytes:
        return self.genome.codes(self.names[record])

    def release(self) -> None:
        self.genome.release()

    def identity(self) -> dict[str, Any]:
        return {"fasta": identity_of_file(self.path)}


class BedRecords(Records):
    """Intervals of a genome; those on strand `-` are read as their reverse complement."""

    def __init__(self, bed: str | Path, genome: str | Path):
        self.bed, self.path = Path(bed), Path(genome)
        self.genome = Genome(genome)
        rows = read_bed(bed)
        for row in rows:
            length = self.genome.contigs[self.genome.resolve(row.interval.chrom)]
            if row.interval.end > length:
                raise ValueError(
                    f"{bed}, line {row.line}: {row.interval} ends beyond the {length} bp of its contig. Are BED and"
                    " genome of the same assembly?"
                )
        self.intervals = [row.interval for row in rows]
        self.names = [
            row.fields[0] if row.fields and row.fields[0] not in ("", ".") else str(row.interval) for row in rows
        ]
        self.lengths = np.array([len(row.interval) for row in rows], dtype=np.int64)

    def codes(self, record: int) -> Bytes:
        return self.genome.fetch(self.intervals[record])

    def place(self, record: int, start: int, end: int) -> Interval:
        whole = self.intervals[record]
        if whole.strand == "-":
            return Interval(whole.chrom, whole.end - end, whole.end - start, "-")
        return Interval(whole.chrom, whole.start + start, whole.start + end)

    def release(self) -> None:
        self.genome.release()

    def identity(self) -> dict[str, Any]:
        return {"bed": identity_of_file(self.bed), "genome": identity_of_file(self.path)}


class TextRecords(Records):
    """Sequences that are given as text.

    Args:
        sequences: IUPAC letters, in either case.
        names: one each; by default their numbers from 0.
        columns: what to carry into the output.

    Raises:
        ValueError: a sequence is empty or holds a letter that is no nucleotide; it names the row.
    """

    def __init__(self, sequences: Sequence[str], names: Sequence[str] | None = None, columns: pa.Table | None = None):
        self.sequences = sequences
        self.names = list(names) if names is not None else [str(number) for number in range(len(sequences))]
        self.columns = columns
        empty = next((self.names[row] for row, text in enumerate(sequences) if not text), None)
        if empty is not None or not len(sequences):
            raise ValueError(f"Sequence {empty!r} is empty." if empty is not None else "There is no sequence.")
        self.lengths = np.array([len(text) for text in sequences], dtype=np.int64)
        self._inputs: dict[str, Any] = {}

    @classmethod
    def read(cls, path: str | Path) -> "TextRecords":
        """Read a table (.parquet, .csv, .tsv, plain or gzip) with a column `sequence`; `name` or `id` names the rows.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no table, or has no such column.
        """
        path = Path(path)
        identity = identity_of_file(path)
        table = _read_table(path)
        wanted = {name.lower(): name for name in table.column_names}
        column = next((wanted[name] for name in SEQUENCE_COLUMNS if name in wanted), None)
        if column is None:
            raise ValueError(f"{path} has no column 'sequence'; it has: {', '.join(table.column_names)}.")
        label = next((wanted[name] for name in ("name", "id") if name in wanted), None)
        names = [str(value) for value in table.column(label).to_pylist()] if label else None
        taken = {column, label, "name", "record", "chrom", "start", "end", "strand", "embedding"}
        kept = table.select([name for name in table.column_names if name not in taken])
        sequences = [value or "" for value in table.column(column).cast(pa.string()).to_pylist()]
        records = cls(sequences, names, kept if kept.num_columns else None)
        records._inputs = {"table": identity}
        return records

    def codes(self, record: int) -> Bytes:
        try:
            return alphabet.from_text(self.sequences[record])
        except ValueError as error:
            raise ValueError(f"Sequence {self.names[record]!r}: {error}") from None

    def identity(self) -> dict[str, Any]:
        if not self._inputs:
            import hashlib

            digest = hashlib.sha256("\n".join(self.sequences).encode()).hexdigest()[:16]
            self._inputs = {"sequences": digest}
        return self._inputs


def _read_table(path: Path) -> pa.Table:
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            return pq.read_table(path)
        if name.endswith((".csv", ".tsv", ".txt")):
            from pyarrow import csv

            options = csv.ParseOptions(delimiter="," if name.endswith(".csv") else "\t")
            return csv.read_csv(path, parse_options=options)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} can't be read as a table: {error}.") from None
    raise ValueError(f"A table must be .parquet, .csv or .tsv (or .gz of the latter two); got {str(path)!r}.")


def open_records(
    fasta: str | Path | None, bed: str | Path | None, genome: str | Path | None, table: str | Path | None
) -> Records:
    """Open the one input that was given.

    Raises:
        ValueError: none or several were given, or a BED without its genome.
        FileNotFoundError: a file is missing.
    """
    given = [name for name, value in (("fasta", fasta), ("bed", bed), ("table", table)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"Give one of fasta, bed (with genome) or table; got {', '.join(given) or 'none'}.")
    if fasta is not None:
        return FastaRecords(fasta)
    if table is not None:
        return TextRecords.read(table)
    if genome is None or bed is None:
        raise ValueError("A BED file needs the genome that it lies on: genome=my.fa.")
    return BedRecords(bed, genome)
