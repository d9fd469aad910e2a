"""The table of an evaluation: our runs beside published numbers of the same protocol, as CSV, Markdown and HTML."""

import csv
import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from genossm.files import write_atomically

COLUMNS = ("task", "model", "metric", "mean ± sd", "min to max", "runs", "source")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: a model on a task; `spread` of published numbers is what their table gives after ±."""

    task: str
    model: str
    metric: str
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    """Smallest and largest of the runs."""
    interval_low: float | None = None
    interval_high: float | None = None
    """Bootstrap confidence interval (95 %) over test rows, averaged over the runs."""
    runs: int = 1
    failed: int = 0
    rate: float | None = None
    source: str = "ours"

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of `COLUMNS`."""
        mean = f"{self.mean:.3f}" + (f" ± {self.sd:.3f}" if self.sd is not None else "")
        if self.interval_low is not None:
            mean += f" [{self.interval_low:.3f}, {self.interval_high:.3f}]"
        extremes = f"{self.low:.3f} to {self.high:.3f}" if self.low is not None and self.high is not None else ""
        runs = f"{self.runs}" + (f" ({self.failed} failed)" if self.failed else "")
        return self.task, self.model, self.metric, mean, extremes, runs, self.source


def summarise(task: str, model: str, found: Sequence[tuple[float, dict[str, Any]]], failed: int = 0) -> Row:
    """Return the row of a task's runs, at the learning rate whose validation mean is best; test never chooses.

    Args:
        task, model: names.
        found: learning rate and result.json of each finished run.
        failed: runs that failed.
    """
    from genossm.tasks.metrics import mode_of, reported_metric

    monitor = found[0][1]["monitor"]
    metric = reported_metric(monitor, found[0][1]["target"])
    sign = 1 if mode_of(monitor) == "max" else -1
    rates = sorted({rate for rate, _ in found})
    best = max(rates, key=lambda r: sign * statistics.mean(v["metrics"][monitor] for rate, v in found if rate == r))
    chosen = [values for rate, values in found if rate == best]
    scores = [values["metrics"][f"test/{metric}"] for values in chosen]
    return Row(
        task=task,
        model=model,
        metric=metric,
        mean=statistics.mean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        low=min(scores),
        high=max(scores),
        interval_low=statistics.mean(values["interval"][0] for values in chosen),
        interval_high=statistics.mean(values["interval"][1] for values in chosen),
        runs=len(scores),
        failed=failed,
        rate=best,
        source=f"ours, {chosen[0]['protocol']}",
    )


def average(task: str, model: str, results: Sequence[Path]) -> Row | None:
    """Return the row of one model made of several runs: the mean of their answers on the test rows that they share.

    Args:
        task, model: names.
        results: result.json of each run, beside which run/TIME/ holds its predictions.

    Returns:
        None where there are fewer than two runs, one left no predictions, or their test rows differ.
    """
    import torch

    from genossm.data.examples import Target
    from genossm.tasks.metrics import bootstrap, evaluate_outputs, reported_metric

    files = [file for result in results for file in sorted(result.parent.glob("run/*/predictions.csv"))[-1:]]
    if not 2 <= len(results) == len(files):
        return None
    values = json.loads(results[0].read_text())
    target = Target(kind=values["target"], names=tuple(values["names"]))
    tables = [list(csv.reader(file.read_text().splitlines()))[1:] for file in files]
    known = [[line[:4] for line in table] for table in tables]
    if any(other != known[0] for other in known[1:]):
        return None
    answers_RMC = torch.tensor([[[float(cell) for cell in line[4:]] for line in table] for table in tables])
    mean_MC = answers_RMC.double().mean(0)
    if target.chooses:
        truth, outputs_MC = torch.tensor([target.names.index(line[3]) for line in tables[0]]), mean_MC.log()
    else:
        truth = torch.tensor([[float(cell) for cell in line[3].split(";")] for line in tables[0]])
        outputs_MC = mean_MC.logit() if target.kind == "multilabel" else mean_MC
        truth = truth.long() if target.kind == "multilabel" else truth
    metric = reported_metric(values["monitor"], target.kind)
    low, high = bootstrap(target, outputs_MC.float(), truth, metric)
    return Row(
        task=task,
        model=f"{model}, mean of {len(files)} seeds",
        metric=metric,
        mean=evaluate_outputs(target, outputs_MC.float(), truth)[metric],
        interval_low=low,
        interval_high=high,
        source=f"ours, {values['protocol']}",
    )


def read_published(benchmark: str | None, protocol: str, task: str) -> list[Row]:
    """Return the published numbers of a task under the very same protocol; none where there are none."""
    text = (resources.files("genossm") / "assets" / "published.csv").read_text()
    rows = csv.DictReader(text.splitlines())
    return [
        Row(
            task=task,
            model=row["model"],
            metric=row["metric"],
            mean=float(row["value"]),
            low=float(row["value"]) - float(row["spread"]) if row["spread"] else None,
            high=float(row["value"]) + float(row["spread"]) if row["spread"] else None,
            runs=int(row["runs"]),
            source=row["source"],
        )
        for row in rows
        if (row["benchmark"], row["protocol"], row["task"]) == (benchmark, protocol, task)
    ]


def write_tables(folder: Path, title: str, rows: Sequence[Row], footer: Sequence[str]) -> None:
    """Write table.csv, table.md and table.html."""
    write_atomically(folder / "table.csv", lambda path: _write_csv(path, rows))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row.cells()) + " |" for row in rows]
    text = f"# {title}\n\n" + "\n".join(lines) + "\n\n" + "".join(f"- {line}\n" for line in footer)
    write_atomically(folder / "table.md", lambda path: path.write_text(text))
    write_atomically(folder / "table.html", lambda path: path.write_text(_page(title, rows, footer)))


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _page(title: str, rows: Sequence[Row], footer: Sequence[str]) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts.append("<style>body{font:14px sans-serif}td,th{padding:2px 10px;text-align:left;white-space:nowrap}</style>")
    parts.append(f"<h1>{html.escape(title)}</h1><table><tr>")
    parts += [f"<th>{name}</th>" for name in (*COLUMNS, "")]
    for row in rows:
        parts.append("</tr><tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells()))
        parts.append(f"<td>{_bar(row)}</td>")
    parts.append("</tr></table><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in footer) + "</ul>")
    return "\n".join(parts) + "\n"


def _bar(row: Row) -> str:
    """Return a bar from 0 to 1 with an error bar: from the smallest to the largest run, or of one run the interval."""
    width = 200 * min(1.0, max(0.0, row.mean))
    colour = "#2a6f97" if row.source.startswith("ours") else "#b0b7bd"
    line = ""
    # Of one run there is no spread over runs to show, but one over its test rows.
    alone = row.runs == 1 and row.interval_low is not None
    low, high = (row.interval_low, row.interval_high) if alone else (row.low, row.high)
    if low is not None and high is not None:
        ends = [200 * min(1.0, max(0.0, value)) for value in (low, high)]
        line = f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="8" y2="8" stroke="black" stroke-width="2"/>'
    return f'<svg width="204" height="16"><rect width="{width:.1f}" height="16" fill="{colour}"/>{line}</svg>'
