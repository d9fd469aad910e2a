"""`genossm bench`: time and memory of the data path, ops and training, beside what they are compared with."""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from genossm.files import write_atomically

_COLUMNS = ("comparison", "variant", "ms", "tokens/s", "speed", "peak MiB", "held MiB", "target")


def topics() -> list[str]:
    """Return what can be measured: the modules of `genossm.benchmarks`."""
    import genossm.benchmarks as folder

    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name not in ("base", "published"))


def bench(
    topic: str,
    only: str = "",
    device: str = "auto",
    threads: int = 0,
    seconds: float = 3.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    out: Path | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Measure a topic: data, ops, train, …; each row's ratio is to the first variant of its comparison.

    For example `genossm bench ops`, or `genossm bench load --threads 1 --device cpu --out load.json`.

    Variants run in turn in one process, so that the ratios hold on a busy machine; times are medians. Peak memory is
    that of one run above its inputs.

    Args:
        topic: a module of `genossm.benchmarks`.
        only: run the comparisons whose name contains this.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        threads: CPU threads; 0 leaves torch's choice.
        seconds: time to spend on each comparison, about.
        as_json: print JSON lines instead of a table.
        out: also write the rows to this file, as JSON, with the machine, after each comparison; scaling and generation
            are drawn beside it.
        resume: keep the comparisons that out holds already, and measure only the others.

    Returns:
        The rows.

    Raises:
        ValueError: no such topic, comparison or device, or out holds what another topic or machine gave.
    """
    import torch
    from rich.console import Console

    from genossm.benchmarks.base import measure
    from genossm.plot import BENCHES, plot

    if topic not in topics():
        raise ValueError(f"No benchmark is named {topic!r}; there are: {', '.join(topics())}.")
    chosen = choose_device(device)
    if threads:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"genossm.benchmarks.{topic}")
    comparisons = module.comparisons(chosen)
    wanted = [comparison for comparison in comparisons if only in comparison.name]
    if not wanted:
        raise ValueError(
            f"No comparison of {topic} has {only!r} in its name: {', '.join(c.name for c in comparisons)}."
        )
    console, progress = Console(), Console(stderr=True)
    rows = _held(out, topic, machine(chosen)) if resume else []
    held = {row["comparison"] for row in rows}
    for comparison in wanted:
        if comparison.name in held:
            continue
        with progress.status(comparison.name) as status:

            def report(what: str, name: str = comparison.name, show: Callable[[str], None] = status.update) -> None:
                show(f"{name}: {what}")

            new = [dataclasses.asdict(row) for row in measure(comparison, chosen, seconds, report=report)]
        rows += new
        if as_json:
            for row in new:
                console.print(json.dumps(row), highlight=False, soft_wrap=True)
        if out is not None:
            text = json.dumps({"topic": topic, "machine": machine(chosen), "rows": rows}, indent=1) + "\n"
            write_atomically(out, lambda path, text=text: path.write_text(text))
    if not as_json:
        console.print(table(topic, rows, machine(chosen)))
    if topic == "scaling":
        for series, power in module.exponents(rows).items():
            console.print(f"{series}: time grows with length^{power:.2f}", highlight=False)
    if out is not None and topic in BENCHES:
        console.print(str(plot(out, out=out.with_suffix(".png"), overwrite=True).path))
    return rows


def _held(out: Path | None, topic: str, where: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier run.

    Raises:
        ValueError: they are of another topic or machine, or no file is named.
    """
    if out is None:
        raise ValueError("--resume goes on with the rows of a file; say which with --out.")
    if not out.exists():
        return []
    report = json.loads(out.read_text())
    if (report["topic"], report["machine"]) != (topic, where):
        raise ValueError(
            f"{out} holds {report['topic']} on {report['machine']}, not {topic} on {where}; choose another out."
        )
    return report["rows"]


def choose_device(name: str) -> Any:
    """Return the torch device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: it is none of "auto", "cpu" and "cuda", or there is no GPU.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}.")
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError("device=cuda, but torch sees no GPU; take device=cpu.")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def machine(device: Any) -> str:
    """Return in a few words what was measured on."""
    import platform

    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(topic: str, rows: list[dict[str, Any]], where: str) -> Any:
    """Return the rows as a table for the terminal, without columns that are empty."""
    from rich import box
    from rich.table import Table

    cells: dict[str, list[str]] = {name: [] for name in _COLUMNS}
    before = None
    for row in rows:
        rate, peak, held = row["tokens_per_second"], row["peak_mib"], row["held_mib"]
        shown = (
            row["comparison"] if row["comparison"] != before else "",
            row["variant"],
            f"{1e3 * row['seconds']:,.3g}" if row["seconds"] < 1 else f"{1e3 * row['seconds']:,.0f}",
            "" if rate is None else f"{rate:,.0f}",
            f"{row['ratio']:.2f}x",
            "" if peak is None else f"{peak:,.0f}",
            "" if held is None else f"{held:,.2f}",
            row["target"],
        )
        for name, text in zip(_COLUMNS, shown, strict=True):
            cells[name].append(text)
        before = row["comparison"]
    filled = {name: column for name, column in cells.items() if any(column)}
    table = Table(title=f"bench {topic} ({where})", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in filled:
        words = name in ("comparison", "variant")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for line in zip(*filled.values(), strict=True):
        table.add_row(*line)
    return table
