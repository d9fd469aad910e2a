"""Figures from the tables that the other verbs write."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(rows: Mapping[int, Mapping[str, float]], baselines: Mapping[str, float], path: str | Path) -> Path:
    """Draw training and validation bits per base over steps, with horizontal lines for the context models.

    Args:
        rows: metrics by step, as `MetricsTable` holds them.
        baselines: bits of each context model.
        path: a .png, .svg or .pdf file.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.75, 0.84))
    for name, label, style in (
        ("train/bits", "training", {"alpha": 0.5, "lw": 1}),
        ("val/bits", "validation", {"marker": "o"}),
    ):
        points = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)  # type: ignore[arg-type]
    for name, bits in baselines.items():
        axes.axhline(bits, color="0.7", lw=0.8, zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": True}
        axes.annotate(f" {name}", (1, bits), fontsize=7, color="0.4", **place)  # type: ignore[arg-type]
    axes.set(xlabel="step", ylabel="bits per base")
    axes.set_ylim(top=min(2.1, axes.get_ylim()[1]))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw time over length, both logarithmic, one line a backbone, training and inference side by side.

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
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            series, _, length = row["comparison"].rpartition(" ")
            name, _, kind = series.rpartition(" ")
            if kind == work and not math.isnan(row["seconds"]):
                lines.setdefault(name, []).append((int(length), 1e3 * row["seconds"]))
        for name, points in lines.items():
            axes.loglog(*zip(*points, strict=True), marker="o", ms=4, label=name)
        axes.set(xlabel="length in tokens", title=work)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)
