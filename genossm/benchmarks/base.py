"""How a benchmark is taken: variants of one thing, run in turn in one process, medians, and the peak of memory."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Run = Callable[[], object]


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


def measure(comparison: Comparison, device: torch.device, seconds: float = 3.0, least: int = 3) -> list[Row]:
    """Run the variants of a comparison in turn, round after round, so that a busy machine slows all alike.

    Args:
        comparison: what to run.
        device: where it runs; a GPU is waited for around every run.
        seconds: time to spend on it, about; at least `least` rounds are run after one that warms up.
        least: rounds.

    Returns:
        One row a variant, in order; one that says "out of memory" where the device has too little.
    """
    try:
        return _measure(comparison, device, seconds, least)
    except torch.OutOfMemoryError:
        # What does not fit is a result too.
        return [
            Row(
                comparison=comparison.name,
                variant="out of memory",
                seconds=math.nan,
                ratio=math.nan,
                tokens_per_second=None,
                peak_mib=None,
                runs=0,
            )
        ]
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(comparison: Comparison, device: torch.device, seconds: float, least: int) -> list[Row]:
    variants = comparison.build()
    # The first runs compile kernels and make threads, which is neither time nor memory of the work itself.
    slowest = max(_timed(run, device) for run in variants.values())
    peaks = {name: peak_mib(run, device) if comparison.memory else None for name, run in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    if slowest > seconds:
        least = 1
    began = time.perf_counter()
    rounds = 0
    while rounds < least or (time.perf_counter() - began) * (rounds + 1) / rounds < seconds:
        for name, run in variants.items():
            times[name].append(_timed(run, device))
        rounds += 1
    work = comparison.tokens if isinstance(comparison.tokens, Mapping) else dict.fromkeys(times, comparison.tokens)
    first, *_ = times
    return [
        Row(
            comparison=comparison.name,
            variant=name,
            seconds=statistics.median(taken),
            ratio=statistics.median(a / b for a, b in zip(times[first], taken, strict=True))
            * (work[name] / work[first] if work[first] else 1),
            tokens_per_second=work[name] / statistics.median(taken) if work[name] else None,
            peak_mib=peaks[name],
            runs=rounds,
            held_mib=comparison.held() if comparison.held is not None else None,
            target=comparison.targets.get(name, ""),
        )
        for name, taken in times.items()
    ]


def _timed(run: Run, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(run: Run, device: torch.device) -> float | None:
    """Return the memory in MiB that one run takes above what is there before it.

    On a GPU it is the allocator's peak; on the CPU the peak of resident memory of a forked child, which needs Linux:
    None elsewhere.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(run, sender))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        raise RuntimeError(f"The process that measures memory ended with code {child.exitcode}.") from None
    finally:
        child.join()


def _send_peak(run: Run, sender: Connection) -> None:
    # The parent's pool of threads does not live on in a forked child; waiting for it would never end.
    torch.set_num_threads(1)
    # 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib("VmRSS")
    run()
    sender.send(max(0.0, _resident_mib("VmHWM") - before))


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
