"""How a benchmark is taken: variants of one thing, run in turn in one process, medians, and the peak of memory."""

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Run = Callable[[], object]

OUT_OF_MEMORY = "out of memory"
_REPEATS = 15
"""The most runs of a variant in one round."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants of one piece of work, compared in one process.

    `build()` makes inputs and models and returns each variant by name; what it does is not timed. The first variant
    is what the others are compared with.
    """

    name: str
    build: Callable[[], Mapping[str, Run]]
    tokens: int | Mapping[str, int] = 0
    """Tokens (or bases) that one run handles, for tokens/s; 0 where the notion makes no sense. Where variants differ in
    it, each one's own by name: ratios are then of the time a token."""
    memory: bool = True
    """Whether the peak of memory above the inputs is measured, in one more run of each variant."""
    held: Callable[[], float] | None = None
    """MiB that stay between runs, such as a state; asked for after the last run."""
    once: Collection[str] = ()
    """Variants that take so long (half a minute) that they run a single time, for time and memory at once and with
    nothing before it that warms up."""
    targets: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a variant is held to, in words, such as "20x, 21 MiB"."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant's result."""

    comparison: str
    variant: str
    seconds: float
    """Median wall time of a run."""
    ratio: float
    """How many times as fast as the first variant, a run or a token: the median of the rounds' ratios."""
    tokens_per_second: float | None
    peak_mib: float | None
    """Memory above what the inputs take; None where it was not measured."""
    runs: int
    held_mib: float | None = None
    """Memory that stays between runs; None where the notion makes no sense."""
    target: str = ""
    """What the variant is held to."""


def unmeasured(comparison: Comparison, why: str) -> Row:
    """Return the row of what gave no time, which says why in place of a variant."""
    nothing = math.nan
    return Row(
        comparison=comparison.name,
        variant=why,
        seconds=nothing,
        ratio=nothing,
        tokens_per_second=None,
        peak_mib=None,
        runs=0,
    )


def measure(
    comparison: Comparison,
    device: torch.device,
    seconds: float = 3.0,
    least: int = 3,
    report: Callable[[str], None] = lambda _: None,
    single: bool = False,
) -> list[Row]:
    """Run the variants of a comparison in turn, round after round, so that a busy machine slows all alike.

    In a round a variant runs up to `_REPEATS` times, while that takes less than a quarter of what the slowest does, and
    the median counts: a long run of the slowest is no reason to know little of the others.

    Args:
        comparison: what to run.
        device: where it runs; a GPU is waited for around every run.
        seconds: time to spend on it, about; at least `least` rounds are run after one that warms up, or a single one
            where a variant alone takes that long.
        least: rounds.
        report: is told what runs next.
        single: run each variant once, for time and memory at once: what takes long, of kernels that have run before.

    Returns:
        One row a variant, in order; one that says "out of memory" where the device has too little.
    """
    try:
        return _measure(comparison, device, seconds, least, report, single)
    except torch.OutOfMemoryError:
        # What does not fit is a result too.
        row = unmeasured(comparison, OUT_OF_MEMORY)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    # What the pass that failed still holds may stand in cycles.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [row]


def _measure(
    comparison: Comparison,
    device: torch.device,
    seconds: float,
    least: int,
    report: Callable[[str], None],
    single: bool,
) -> list[Row]:
    report("building")
    variants = comparison.build()
    repeated = {name: run for name, run in variants.items() if not single and name not in comparison.once}
    peaks: dict[str, float | None] = dict.fromkeys(variants)
    singles: dict[str, float] = {}
    quickest: dict[str, float] = {}
    for name, run in variants.items():
        if name in repeated:
            # The first run compiles kernels and makes threads, which is neither time nor memory of the work itself.
            report(f"{name}, first run")
            quickest[name] = _timed(run, device)
            if comparison.memory:
                report(f"{name}, memory")
                peaks[name] = peak_mib(run, device, warm=quickest[name] < seconds)
        else:
            report(f"{name}, its only run")
            singles[name], peaks[name] = _run_for_peak(run, device, warm=False)
    times, rounds = _rounds(repeated, quickest, device, seconds, least, report)
    times |= {name: [single] * max(1, rounds) for name, single in singles.items()}
    work = comparison.tokens if isinstance(comparison.tokens, Mapping) else dict.fromkeys(times, comparison.tokens)
    first = next(iter(variants))
    return [
        Row(
            comparison=comparison.name,
            variant=name,
            seconds=statistics.median(times[name]),
            ratio=statistics.median(a / b for a, b in zip(times[first], times[name], strict=True))
            * (work[name] / work[first] if work[first] else 1),
            tokens_per_second=work[name] / statistics.median(times[name]) if work[name] else None,
            peak_mib=peaks[name],
            runs=rounds if name in repeated else 1,
            held_mib=comparison.held() if comparison.held is not None else None,
            target=comparison.targets.get(name, ""),
        )
        for name in variants
    ]


def _rounds(
    variants: Mapping[str, Run],
    quickest: dict[str, float],
    device: torch.device,
    seconds: float,
    least: int,
    report: Callable[[str], None],
) -> tuple[dict[str, list[float]], int]:
    """Return each variant's time in every round, and the number of rounds; `quickest` is the least known so far."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    began, rounds = time.perf_counter(), 0
    while variants and (rounds < least or (time.perf_counter() - began) * (rounds + 1) / rounds < seconds):
        slowest = max(quickest.values())
        for name, run in variants.items():
            report(f"{name}, round {rounds + 1}")
            taken = [_timed(run, device)]
            while len(taken) < _REPEATS and taken[0] * (len(taken) + 1) < slowest / 4:
                taken.append(_timed(run, device))
            times[name].append(statistics.median(taken))
            quickest[name] = min(quickest[name], *taken)
        rounds += 1
        if max(quickest.values()) > seconds:
            break
    return times, rounds


def _timed(run: Run, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(run: Run, device: torch.device, warm: bool = True) -> float | None:
    """Return the memory in MiB that one run takes above what is there before it.

    On a GPU it is the allocator's peak; on the CPU the peak of resident memory of a forked child, which needs Linux:
    None elsewhere. `warm` runs it once before in the child, too, for which libraries' own pages are mapped anew.
    """
    return _run_for_peak(run, device, warm)[1]


def _run_for_peak(run: Run, device: torch.device, warm: bool) -> tuple[float, float | None]:
    """Return the seconds and the peak in MiB of the same run."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = _timed(run, device)
        return seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return _timed(run, device), None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(run, sender, warm))
    child.start()
    sender.close()
    try:
        seconds, peak = receiver.recv()
        return float(seconds), float(peak)
    except EOFError:
        raise RuntimeError(f"The process that measures memory ended with code {child.exitcode}.") from None
    finally:
        child.join()


def _send_peak(run: Run, sender: Connection, warm: bool) -> None:
    # The parent's pool of threads does not live on in a forked child; waiting for it would never end.
    torch.set_num_threads(1)
    if warm:
        run()
    # What glibc keeps of memory that was freed would be used again and not be counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    # 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib("VmRSS")
    seconds = _timed(run, torch.device("cpu"))
    sender.send((seconds, max(0.0, _resident_mib("VmHWM") - before)))


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
