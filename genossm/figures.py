"""Figures of rows: loss curves, bars, scaling curves, embeddings, sequence logos, variant tracks."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLORS = {"A": "#2a9d4a", "C": "#2f6fc4", "G": "#e8a117", "T": "#d0372d"}
Rows = Sequence[Mapping[str, Any]]


def blank(width: float = 8, height: float = 4.5) -> tuple[Any, Any]:
    """Return an empty figure and its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def need(rows: Rows, *columns: str) -> None:
    """Refuse rows without a column.

    Raises:
        KeyError: one is missing; the message lists what there is.
    """
    for column in columns:
        if column not in rows[0]:
            raise KeyError(f"There is no column {column!r}; there are: {', '.join(rows[0])}.")


def loss(rows: Mapping[int, Mapping[str, float]], baselines: Mapping[str, float]) -> Any:
    """Draw bits per base over steps, with horizontal lines for the context models."""
    figure, axes = blank()
    # The names of the lines stand to the right of the axes.
    figure.set_layout_engine("none")
    axes.set_position((0.09, 0.12, 0.75, 0.84))
    highest = 2.1
    for name, label, style in (
        ("train/bits", "training", {"alpha": 0.5, "lw": 1}),
        ("val/bits", "validation", {"marker": "o"}),
    ):
        points = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
            # A line that stays above is shown too.
            highest = max(highest, 1.1 * min(bits for _, bits in points))
    for bits in baselines.values():
        axes.axhline(bits, color="0.7", lw=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="bits per base")
    bottom, top = axes.set_ylim(top=min(highest, axes.get_ylim()[1]))
    place, height = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": True}, top
    # From above down, so far apart that they can be read where lines are close.
    for name, bits in sorted(baselines.items(), key=lambda item: -item[1]):
        height = min(bits, height - 0.024 * (top - bottom))
        axes.annotate(f" {name}", (1, height), fontsize=7, color="0.4", **place)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure


def bars(rows: Rows, column: str) -> Any:
    """Draw one group of bars a task, one bar a model; several rows of one bar give its mean and spread."""
    need(rows, "task", "model", column)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        found[str(row["task"]), str(row["model"])].append(float(row[column]))
    tasks, models = (list(dict.fromkeys(key[side] for key in found)) for side in (0, 1))
    figure, axes = blank(max(6.0, 0.5 * len(tasks) * len(models) + 2))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        places = [task + (number - (len(models) - 1) / 2) * width for task in range(len(tasks))]
        values = [found.get((task, model), [np.nan]) for task in tasks]
        spread = [float(np.std(value)) for value in values]
        axes.bar(places, [float(np.mean(value)) for value in values], width, yerr=spread, label=model)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set(ylabel=column)
    figure.legend(loc="outside upper center", ncols=min(4, len(models)), frameon=False)
    return figure


def scaling(rows: Rows, column: str | None) -> Any:
    """Draw a measurement over length, both logarithmic, one curve a model (or variant)."""
    known = [name for name in ("ms", "seconds", "ms_per_token", "tokens_per_second", "mib") if name in rows[0]]
    chosen = column or (known[0] if known else "")
    need(rows, "length", chosen)
    label = next((name for name in ("model", "variant", "name") if name in rows[0]), None)
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row[chosen] not in ("", None):
            curves[str(row[label]) if label else chosen].append((float(row["length"]), float(row[chosen])))
    figure, axes = blank()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="length in tokens", ylabel=chosen)
    axes.legend(frameon=False)
    return figure


def embedding(rows: Rows, color: str | None, method: str) -> Any:
    """Draw embeddings in two dimensions, coloured by a column.

    Raises:
        ValueError: no such method, too few rows, or umap-learn is not installed.
    """
    name = next(column for column in rows[0] if column.startswith("embedding"))
    values_ND = np.array([row[name] for row in rows], dtype=np.float64)
    if len(rows) < 3:
        raise ValueError(f"A figure of embeddings needs at least 3 rows; got {len(rows)}.")
    from matplotlib import colormaps

    points_N2, labels = _projected(values_ND, method)
    figure, axes = blank(7.5, 5.5)
    if color is None:
        axes.scatter(*points_N2.T, s=8)
    else:
        need(rows, color)
        kinds = [row[color] for row in rows]
        numbers = all(isinstance(kind, int | float) for kind in kinds) and len(set(kinds)) > 10
        if numbers:
            figure.colorbar(axes.scatter(*points_N2.T, s=8, c=kinds), label=color)
        else:
            different = sorted(set(map(str, kinds)))
            shades = colormaps["tab10" if len(different) <= 10 else "turbo"].resampled(max(10, len(different)))
            for number, kind in enumerate(different):
                chosen = np.array([str(k) == kind for k in kinds])
                axes.scatter(*points_N2[chosen].T, s=8, label=kind, color=shades(number))
            figure.legend(loc="outside right upper", ncols=-(-len(different) // 25), frameon=False, title=color)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return figure


def _projected(values_ND: Any, method: str) -> tuple[Any, tuple[str, str]]:
    if method == "pca":
        centred_ND = values_ND - values_ND.mean(0)
        left, sizes, _ = np.linalg.svd(centred_ND, full_matrices=False)
        share = sizes**2 / max(float((sizes**2).sum()), 1e-30)
        return left[:, :2] * sizes[:2], (f"PC1 ({share[0]:.0%})", f"PC2 ({share[1]:.0%})")
    if method != "umap":
        raise ValueError(f"method must be pca or umap; got {method!r}.")
    from genossm.ops.backend import installed

    if not installed("umap"):
        raise ValueError("method=umap needs the package umap-learn: pip install 'genossm[umap]'; or use pca.")
    import importlib

    umap = importlib.import_module("umap")
    return umap.UMAP(random_state=0, n_jobs=1).fit_transform(values_ND), ("UMAP 1", "UMAP 2")


def logo(rows: Rows, region: int, column: str) -> Any:
    """Draw a region's mutagenesis: above each base as high as its loss would cost, below all substitutions."""
    import pyarrow as pa
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    from genossm.tables import substitution_matrix

    need(rows, "region", "position", "strand", "ref", "alt", column)
    table = pa.Table.from_pylist([dict(row) for row in rows])
    effects_4L = substitution_matrix(table, region, column)
    mine = [row for row in rows if row["region"] == region]
    letters = dict(sorted((row["position"], row["ref"]) for row in mine))
    if mine[0]["strand"] == "-":
        letters = dict(reversed(letters.items()))
    first, length = min(letters), effects_4L.shape[1]
    heights = -effects_4L.sum(0) / 3
    figure, axes = blank(max(6.0, min(40.0, 0.16 * length)), 4)
    axes.remove()
    axes, below = figure.subplots(2, 1)
    for position, letter in letters.items():
        place = position - first if mine[0]["strand"] != "-" else first + length - 1 - position
        glyph = TextPath((0, 0), letter, size=1)
        box = glyph.get_extents()
        move = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, heights[place] / box.height)
        axes.add_patch(PathPatch(glyph.transformed(move.translate(place + 0.05, 0)), color=COLORS[letter], lw=0))
    axes.set(xlim=(0, length), ylabel=f"-mean {column}")
    axes.set_ylim(min(0.0, heights.min()) * 1.05, max(1e-9, heights.max()) * 1.05)
    axes.set_xticks([])
    limit = float(np.abs(effects_4L).max()) or 1.0
    image = below.imshow(
        effects_4L, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, extent=(0, length, 4, 0), interpolation="none"
    )
    below.set_yticks([0.5, 1.5, 2.5, 3.5], list("ACGT"))
    below.set(xlabel=f"{mine[0]['chrom']} from {first}")
    figure.colorbar(image, ax=[axes, below], label=column)
    return figure


def track(rows: Rows, column: str) -> Any:
    """Draw a score of variants over their positions, a panel a contig."""
    need(rows, "chrom", "pos", column)
    scored = [row for row in rows if row[column] not in (None, "")]
    if not scored:
        raise ValueError(f"No row has a {column}.")
    contigs = list(dict.fromkeys(str(row["chrom"]) for row in scored))
    figure, axes = blank(9, 2.6 * len(contigs))
    axes.remove()
    for panel, contig in zip(figure.subplots(len(contigs), squeeze=False)[:, 0], contigs, strict=True):
        mine = [row for row in scored if str(row["chrom"]) == contig]
        panel.vlines([int(row["pos"]) for row in mine], 0, [float(row[column]) for row in mine], lw=0.8)
        panel.axhline(0, color="0.5", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(xlabel=f"position on {contig}", ylabel=column)
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def lengths(rows: Rows) -> Any:
    """Draw time over length for rows of `genossm bench scaling`, one line a backbone, training beside inference.

    A line has the fastest variant of each length; where memory ended, a cross stands at the time that the next length
    would have taken, had it grown as before.
    """
    figure, panels = _pair(sharey=True)
    names: list[str] = []
    for work, axes in zip(("training", "inference"), panels, strict=True):
        lines: dict[str, dict[int, float]] = {}
        ends: dict[str, int] = {}
        for row in rows:
            series, _, length = row["comparison"].rpartition(" ")
            name, _, kind = series.rpartition(" ")
            names += [name] if name not in names else []
            if kind == work and not math.isnan(row["seconds"]):
                line = lines.setdefault(name, {})
                line[int(length)] = min(1e3 * row["seconds"], line.get(int(length), math.inf))
            elif kind == work and row["variant"] == "out of memory":
                ends[name] = min(int(length), ends.get(name, int(length)))
        for name, line in lines.items():
            color = f"C{names.index(name)}"
            points = sorted(line.items())
            axes.loglog(*zip(*points, strict=True), marker="o", ms=4, label=name, color=color)
            if name in ends and len(points) > 1:
                (x0, y0), (x1, y1) = points[-2:]
                power = math.log(y1 / y0) / math.log(x1 / x0)
                y2 = y1 * (ends[name] / x1) ** power
                axes.plot([x1, ends[name]], [y1, y2], ls=":", marker="x", markevery=[1], ms=7, color=color)
        axes.set(xlabel="length in tokens", title=work)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    if any(row["variant"] == "out of memory" for row in rows):
        panels[0].plot([], [], ls=":", marker="x", color="black", label="out of memory")
    panels[0].legend(frameon=False)
    return figure


def generation(rows: Rows) -> Any:
    """Draw the time of one more base, and the memory of the state, over the context, one line a backbone.

    Args:
        rows: those of `genossm bench generation`.
    """
    figure, panels = _pair()
    lines: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for row in rows:
        name, _, context = row["comparison"].rpartition(" ")
        label = name if row["variant"] == "step by step" else f"{name}, {row['variant']}"
        lines[label].append((int(context), 1e3 / row["tokens_per_second"], row["held_mib"]))
    for label, points in lines.items():
        context, milliseconds, held = zip(*points, strict=True)
        again = "again" in label
        style = {"marker": "o", "ms": 4, "ls": ":" if again else "-"}
        (line,) = panels[0].loglog(context, milliseconds, label=label, **style)
        if not again:
            panels[1].loglog(context, held, color=line.get_color(), **style)
    panels[0].set(xlabel="bases before", ylabel="ms a base")
    panels[1].set(xlabel="bases before", ylabel="MiB of state")
    contexts = sorted({context for points in lines.values() for context, *_ in points})
    for panel in panels:
        panel.set_xticks(contexts, [f"{context // 1024} k" for context in contexts], minor=False)
        panel.xaxis.minorticks_off()
    # Above the curves, where none of them runs.
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _pair(**shared: bool) -> tuple[Any, Any]:
    """Return an empty figure of two panels side by side."""
    figure, axes = blank(10, 4.5)
    axes.remove()
    panels = figure.subplots(1, 2, **shared)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels
