"""`genossm plot`: figures from the tables that the other verbs write."""

import csv
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genossm.figures as figures
from genossm.files import open_text, write_atomically

FORMATS = (".png", ".svg", ".pdf", ".html")


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
            or with task, model and score (bars) as .csv, .tsv or .json.
        out: the figure; .html holds it as a drawing in a page of its own.
        kind: loss, bars, scaling, embedding, logo or track; by default what the columns tell.
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
    chosen = kind or kind_of(list(rows[0]))
    draw: dict[str, Callable[[], Any]] = {
        "loss": lambda: figures.loss({int(r["step"]): _numbers(r) for r in rows}, {}),
        "bars": lambda: figures.bars(rows, column or "score"),
        "scaling": lambda: figures.scaling(rows, column),
        "embedding": lambda: figures.embedding(rows, color, method),
        "logo": lambda: figures.logo(rows, region, column or "llr"),
        "track": lambda: figures.track(rows, column or "llr"),
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
            rows = loaded.get("rows", []) if isinstance(loaded, dict) else loaded
        else:
            rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ","))
    if not rows:
        raise ValueError(f"{path} holds no row.")
    return rows


def kind_of(columns: list[str]) -> str:
    """Tell from a table's columns what figure it is for.

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
    if any(name.startswith("embedding") for name in columns):
        return "embedding"
    for kind, needed in marks.items():
        if all(name in columns for name in needed):
            return kind
    raise ValueError(
        f"The columns {', '.join(columns[:12])} fit no figure; say kind, one of embedding, {', '.join(marks)}."
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


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw time over length, both logarithmic, one line a backbone, training and inference side by side.

    A line has the fastest variant of each length.

    Args:
        rows: those of `genossm bench scaling`.
        path: a .png, .svg or .pdf file.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for work, axes in zip(("training", "inference"), panels, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            series, _, length = row["comparison"].rpartition(" ")
            name, _, kind = series.rpartition(" ")
            if kind == work and not math.isnan(row["seconds"]):
                line = lines.setdefault(name, {})
                line[int(length)] = min(1e3 * row["seconds"], line.get(int(length), math.inf))
        for name, line in lines.items():
            axes.loglog(*zip(*line.items(), strict=True), marker="o", ms=4, label=name)
        axes.set(xlabel="length in tokens", title=work)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_generation(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the time of one more base, and the memory of the state, over the context, one line a backbone.

    Args:
        rows: those of `genossm bench generation`.
        path: a .png, .svg or .pdf file.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        name, _, context = row["comparison"].rpartition(" ")
        label = name if row["variant"] == "step by step" else f"{name}, {row['variant']}"
        lines.setdefault(label, []).append((int(context), 1e3 / row["tokens_per_second"], row["held_mib"]))
    for label, points in lines.items():
        context, milliseconds, held = zip(*points, strict=True)
        again = "again" in label
        style = {"marker": "o", "ms": 4, "ls": ":" if again else "-"}
        (line,) = panels[0].loglog(context, milliseconds, label=label, **style)
        if not again:
            panels[1].loglog(context, held, color=line.get_color(), **style)
    panels[0].set(xlabel="bases before", ylabel="ms a base")
    panels[1].set(xlabel="bases before", ylabel="MiB of state")
    # Above the curves, where none of them runs.
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return Path(path)
