"""`genossm bench`: time and memory of the data path, ops and training, beside what they are compared with."""

import dataclasses
import importlib
import json
import logging
import math
import os
import pkgutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genossm.files import write_atomically

if TYPE_CHECKING:
    from genossm.benchmarks.base import Comparison

_log = logging.getLogger(__name__)
_SINGLE = 4
"""Times the seconds of a comparison from which its runs are single."""
_SUMMARIES = ("scaling", "longest")
_COLUMNS = ("comparison", "variant", "ms", "tokens/s", "speed", "peak MiB", "held MiB", "target")


def topics() -> list[str]:
    """Return what can be measured: the modules of `genossm.benchmarks`."""
    import genossm.benchmarks as folder

    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name not in ("base", "published", "sweep"))


def bench(
    topic: str,
    only: str = "",
    device: str = "auto",
    threads: int = 0,
    seconds: float = 3.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    out: Path | None = None,
    resume: bool = False,
    limit: float = 0,
    memory: float = 0,
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
        limit: seconds for all of it; what would take longer is left out, and said. 0: no limit.
        memory: GiB that a run may take; more is out of memory. 0: what the machine has.

    Returns:
        The rows.

    Raises:
        ValueError: no such topic, comparison or device, or out holds what another topic or machine gave.
    """
    import torch
    from rich.console import Console

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
    plan = _Plan(chosen, seconds, limit, memory)
    for comparison in wanted:
        if any(row["comparison"] == comparison.name for row in rows):
            continue
        with progress.status(comparison.name) as status:

            def report(what: str, name: str = comparison.name, show: Callable[[str], None] = status.update) -> None:
                show(f"{name}: {what}")

            new = plan.run(comparison, rows, report)
        rows += new
        if as_json:
            for row in new:
                console.print(json.dumps(row), highlight=False, soft_wrap=True)
        if out is not None:
            text = json.dumps({"topic": topic, "machine": machine(chosen), "rows": rows}, indent=1) + "\n"
            write_atomically(out, lambda path, text=text: path.write_text(text))
    if not as_json:
        console.print(table(topic, rows, machine(chosen)))
    if topic in _SUMMARIES:
        for line in module.summary(rows):
            console.print(line, highlight=False)
    if out is not None and topic in BENCHES:
        console.print(str(plot(out, out=out.with_suffix(".png"), overwrite=True).path))
    return rows


class _Plan:
    """What is run, and how, within the time and the memory that there are.

    Args:
        device: where it runs.
        seconds: time to spend on each comparison, about.
        limit: seconds for all; 0: no limit.
        memory: GiB that a run may take; 0: what the machine has.
    """

    def __init__(self, device: Any, seconds: float, limit: float, memory: float):
        self.device, self.seconds = device, seconds
        self.ends = time.monotonic() + limit if limit else math.inf
        self.room_mib = _room_mib(device, memory)

    def run(
        self, comparison: "Comparison", rows: list[dict[str, Any]], report: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """Return the rows of a comparison, after those before it; none where they make it needless."""
        from genossm.benchmarks.base import OUT_OF_MEMORY, measure, unmeasured
        from genossm.benchmarks.sweep import FAILED, NOT_RUN, Foreseen, Point, foresee, needless

        point = comparison if isinstance(comparison, Point) else None
        if point is not None and needless(point, rows):
            return []
        expected = Foreseen(0.0, 0.0) if point is None else foresee(point, rows)
        left = self.ends - time.monotonic()
        # A run that takes long is single, others warm up, tell their memory and are repeated.
        single = expected.seconds > _SINGLE * self.seconds
        runs = 1 if single or comparison.once else 4
        if left <= 0 or expected.seconds * runs > left:
            about = f", about {expected.seconds:.2g} s a run" if expected.seconds else ""
            new = [unmeasured(comparison, f"{NOT_RUN}: {max(0, left):.0f} s left{about}")]
        elif expected.mib > self.room_mib and self.device.type == "cpu":
            # Trying it would take the memory of whatever else runs here; a GPU only says no.
            new = [unmeasured(comparison, OUT_OF_MEMORY)]
        else:
            try:
                new = measure(comparison, self.device, self.seconds, report=report, single=single)
            except Exception as error:
                # One length that fails must not cost the others; on its own it is raised.
                if point is None:
                    raise
                _log.warning("%s: %s", comparison.name, error)
                new = [unmeasured(comparison, f"{FAILED}: {str(error).partition(chr(10))[0]}")]
        if any((row.peak_mib or 0) > self.room_mib for row in new):
            new = [unmeasured(comparison, OUT_OF_MEMORY)]
        return [dataclasses.asdict(row) for row in new]


def _room_mib(device: Any, memory: float) -> float:
    """Return the MiB that a run may take, which a GPU is told.

    Raises:
        ValueError: there is not as much.
    """
    import torch

    whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _physical_bytes()
    if not 0 <= memory * 2**30 <= whole:
        raise ValueError(f"memory must be between 0 and the {whole / 2**30:.4g} GiB of the machine; got {memory}.")
    if memory and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory * 2**30 / whole)
    return memory * 2**10 or whole / 2**20


def _physical_bytes() -> float:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return math.prod(os.sysconf(name) for name in names) if hasattr(os, "sysconf") else math.inf


def _held(out: Path | None, topic: str, where: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier run.

    Raises:
        ValueError: they are of another topic or machine, or no file is named.
    """
    from genossm.benchmarks.sweep import NOT_RUN

    if out is None:
        raise ValueError("--resume goes on with the rows of a file; say which with --out.")
    if not out.exists():
        return []
    report = json.loads(out.read_text())
    if (report["topic"], report["machine"]) != (topic, where):
        raise ValueError(
            f"{out} holds {report['topic']} on {report['machine']}, not {topic} on {where}; choose another out."
        )
    return [row for row in report["rows"] if not row["variant"].startswith(NOT_RUN)]


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
            _milliseconds(row["seconds"]),
            "" if rate is None else f"{rate:,.0f}",
            "" if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}x",
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


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
