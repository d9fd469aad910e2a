"""Rows of text from the files that people keep labels in: CSV, TSV, Parquet, FASTA with labels in headers, BED."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from genossm.dna.interval import SPLIT_NAMES
from genossm.files import open_text

Columns = dict[str, list[str]]
"""Text cells by column name; every column is equally long."""

FASTA_ENDINGS = (".fa", ".fasta", ".fna", ".fas")
ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".bed", *FASTA_ENDINGS)

ALIASES = {
    "sequence": ("sequence", "seq", "dna", "text"),
    "label": ("label", "labels", "target", "class", "cls", "y"),
    "split": ("split", "fold", "set"),
    "chrom": ("chrom", "chr", "chromosome", "region", "contig", "chr_name", "#chrom"),
    "start": ("start", "chromstart", "begin"),
    "end": ("end", "chromend", "stop"),
    "strand": ("strand",),
    "name": ("name", "id"),
}
"""Spellings under which a column is found, by what it means; case is ignored."""

MISSING = ("", "nan", "na", "n/a", "null", "<na>")
"""Cells that hold nothing, in lower case; "none" is a class name that people use."""

csv.field_size_limit(1 << 27)


def ending_of(path: Path) -> str:
    """Return what a file's name ends with, `.gz` aside, in lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    return (suffixes[-2] if len(suffixes) > 1 else "") if suffixes and suffixes[-1] == ".gz" else "".join(suffixes[-1:])


def read_columns(path: str | Path) -> Columns:
    """Read a file into columns of text.

    FASTA headers give `name` and, after the last `|` (or a space), `label`: both published forms.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown ending, no row, a row with too few or too many cells, or a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    ending = ending_of(path)
    if ending not in ENDINGS:
        raise ValueError(f"{path} has an unknown ending; a table is one of {', '.join(ENDINGS)}, plain or .gz.")
    if ending == ".parquet":
        columns = _read_parquet(path)
    elif ending in FASTA_ENDINGS:
        columns = _read_fasta(path)
    else:
        columns = _read_delimited(path, ending)
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{path} holds no row.")
    return columns


def read_splits(folder: Path) -> Columns:
    """Read a folder with one file a split (train.csv, dev.csv, test.csv, …) into columns, `split` among them.

    Raises:
        FileNotFoundError: the folder has no train file.
        ValueError: two files are of the same split, or their columns differ.
    """
    joined: Columns = {}
    seen: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and ending_of(p) in ENDINGS):
        split = SPLIT_NAMES.get(path.name.split(".")[0].lower())
        if split is None:
            continue
        if split in seen:
            raise ValueError(f"{seen[split]} and {path} are both the {split} split; keep one.")
        seen[split] = path
        columns = read_columns(path)
        columns["split"] = [split] * len(next(iter(columns.values())))
        if joined and set(joined) != set(columns):
            raise ValueError(f"{path} has the columns {', '.join(columns)}, unlike {', '.join(joined)}.")
        for name, cells in columns.items():
            joined.setdefault(name, []).extend(cells)
    if "train" not in seen:
        raise FileNotFoundError(f"{folder} has no train file; expected train.csv (.tsv, .parquet, .fna) and test.csv.")
    return joined


def find(columns: Columns, meaning: str) -> list[str] | None:
    """Return the column that a meaning of `ALIASES` is found under, or None."""
    lower = {name.lower(): cells for name, cells in columns.items()}
    for spelling in ALIASES[meaning]:
        if spelling in lower:
            return lower[spelling]
    return None


def refuse_missing(cells: Sequence[str], what: str, where: str) -> None:
    """Refuse a column with empty or NaN cells.

    Raises:
        ValueError: it gives their number and the first rows, counted from 0.
    """
    rows = [row for row, cell in enumerate(cells) if cell.strip().lower() in MISSING]
    if rows:
        raise ValueError(
            f"{where}: {len(rows)} of {len(cells)} rows have no {what} (empty or NaN), the first is row {rows[0]}."
            " Fill them in or remove them."
        )


def _read_delimited(path: Path, ending: str) -> Columns:
    with open_text(path) as handle:
        lines = (line for line in handle if line.strip())
        first = next(lines, "")
        mark = "\t" if ending in (".tsv", ".bed") or ("\t" in first and "," not in first) else ","
        header: list[str] = next(csv.reader([first], delimiter=mark), [""])
        rows: Iterator[list[str]] = csv.reader(lines, delimiter=mark)
        if ending == ".bed" and len(header) > 2 and header[1].isdigit():
            names = ["chrom", "start", "end", "label", "score", "strand"]
            names = (names + [f"column{i + 7}" for i in range(len(header))])[: len(header)]
            cells = [header, *rows]
        else:
            names, cells = [name.strip().lstrip("#") for name in header], list(rows)
    if len(set(names)) < len(names):
        raise ValueError(f"{path} names a column twice: {', '.join(names)}.")
    for number, row in enumerate(cells):
        if len(row) != len(names):
            raise ValueError(f"{path}, row {number}: {len(row)} cells where the header has {len(names)}.")
    return {name: list(column) for name, column in zip(names, zip(*cells, strict=True), strict=True)} if cells else {}


def _read_parquet(path: Path) -> Columns:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}.") from None
    return {
        name: ["" if value is None else str(value) for value in table.column(name).to_pylist()]
        for name in table.column_names
    }


def _read_fasta(path: Path) -> Columns:
    names: list[str] = []
    labels: list[str] = []
    sequences: list[list[str]] = []
    with open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            text = line.strip()
            if text.startswith(">"):
                header = text[1:]
                mark = "|" if "|" in header else " "
                name, found, label = header.rpartition(mark)
                if not found:
                    raise ValueError(f"{path}, line {number}: no label in {text!r}; write >name|label.")
                names.append(name)
                labels.append(label.strip().removeprefix("label="))
                sequences.append([])
            elif text:
                if not sequences:
                    raise ValueError(f"{path} is no FASTA file: line {number} comes before any header.")
                sequences[-1].append(text)
    return {"name": names, "label": labels, "sequence": ["".join(parts) for parts in sequences]}
