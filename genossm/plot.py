"""`genossm plot`: figures from the tables that the other verbs write."""

import csv
import html
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genossm.figures as figures
from genossm.files import open_text, write_atomically

FORMATS = (".png", ".svg", ".pdf", ".html")
BENCHES = {"scaling": "lengths", "generation": "generation"}
"""The figures of what `genossm bench` measures, by topic."""


@dataclass(frozen=True)
class Plotted:
    """What `plot` gives back."""

    path: Path
    kind: str

    def summary(self) -> dict[str, Any]:
        """Return the outcome for the command line."""
        return {"out": self.path, "kind": self.kind}


def plot(
    table: str | Path,
    *,
    out: Path,
    kind: str | None = None,
    color: str | None = None,
    column: str | None = None,
    region: int = 0,
    method: str = "pca",
    overwrite: bool = False,
) -> Plotted:
    """Draw a figure of a table: genossm plot --table T --out figure.png|.svg|.pdf|.html.

    Args:
        table: metrics.csv of a run (loss), embeddings, scores or mutagenesis as Parquet, rows with a length (scaling)
            or with task, model and score (bars) as .csv, .tsv or .json, what bench scaling (lengths) and bench
            generation (generation) wrote.
        out: the figure; .html holds it as a drawing in a page of its own.
        kind: loss, bars, scaling, embedding, logo, track, lengths or generation; by default what the columns tell.
        color: column of an embedding's table that colours the points.
        column: what is drawn: a score (track, logo), a measurement (scaling), a metric (bars).
        region: number of the region of a logo.
        method: how an embedding is laid out: pca or umap.
        overwrite: replace an existing file.

    Returns:
        The path and the kind.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: an input or option is wrong; the message says which.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"out must end in one of {', '.join(FORMATS)}; got {str(out)!r}.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already. Choose another out, or replace it with --overwrite.")
    rows = read_rows(Path(table))
    chosen = kind or kind_of(rows[0])
    draw: dict[str, Callable[[], Any]] = {
        "loss": lambda: figures.loss({int(r["step"]): _numbers(r) for r in rows}, {}),
        "bars": lambda: figures.bars(rows, column or "score"),
        "scaling": lambda: figures.scaling(rows, column),
        "embedding": lambda: figures.embedding(rows, color, method),
        "logo": lambda: figures.logo(rows, region, column or "llr"),
        "track": lambda: figures.track(rows, column or "llr"),
        "lengths": lambda: figures.lengths(rows),
        "generation": lambda: figures.generation(rows),
    }
    if chosen not in draw:
        raise ValueError(f"kind must be one of {', '.join(draw)}; got {chosen!r}.")
    save(draw[chosen](), out)
    return Plotted(out, chosen)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a table as dictionaries: Parquet, CSV, TSV, JSON (a list) or JSON lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no row.
    """
    name = path.name.lower().removesuffix(".gz")
    rows: list[dict[str, Any]]
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    else:
        with open_text(path) as lines:
            text = lines.read()
        if name.endswith((".json", ".jsonl")):
            try:
                loaded = json.loads(text)
            except json.JSONDecodeError:
                loaded = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = loaded
            if isinstance(loaded, dict):
                # What `genossm bench` writes: the topic stands once, above its rows.
                rows = [{"topic": loaded.get("topic"), **row} for row in loaded.get("rows", [])]
        else:
            rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ","))
    if not rows:
        raise ValueError(f"{path} holds no row.")
    return rows


def kind_of(row: Mapping[str, Any]) -> str:
    """Tell from a row of a table what figure it is for.

    Raises:
        ValueError: they fit none.
    """
    marks = {
        "loss": ("step",),
        "logo": ("region", "alt"),
        "track": ("pos", "alt"),
        "scaling": ("length",),
        "bars": ("task", "model"),
    }
    if any(name.startswith("embedding") for name in row):
        return "embedding"
    if row.get("topic") in BENCHES:
        return BENCHES[row["topic"]]
    for kind, needed in marks.items():
        if all(name in row for name in needed):
            return kind
    raise ValueError(
        f"The columns {', '.join(list(row)[:12])} fit no figure; say kind, one of embedding,"
        f" {', '.join([*marks, *BENCHES.values()])}."
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "step" and value not in ("", None)}


def save(figure: Any, out: Path) -> Path:
    """Write a figure in the format that its name ends in."""
    if out.suffix.lower() == ".html":
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg")
        svg = drawing.getvalue()
        page = (
            f"<!doctype html><meta charset='utf-8'><title>{html.escape(out.stem)}</title>{svg[svg.index('<svg') :]}\n"
        )
        write_atomically(out, lambda path: path.write_text(page))
    else:
        write_atomically(out, lambda path: figure.savefig(path, format=out.suffix[1:].lower(), dpi=150))
    return out


def plot_loss(rows: Mapping[int, Mapping[str, float]], baselines: Mapping[str, float], path: str | Path) -> Path:
    """Draw training and validation bits per base over steps, with horizontal lines for the context models.

    Args:
        rows: metrics by step, as `MetricsTable` holds them.
        baselines: bits of each context model.
        path: a .png, .svg or .pdf file.

    Returns:
        The path.
    """
    return save(figures.loss(rows, baselines), Path(path))
