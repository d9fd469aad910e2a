"""`genossm evaluate`: tasks x seeds x learning rates, resumed where it was killed, in one table with published ones."""

import json
import logging
import queue
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from genossm.comparison import COLUMNS, Row, average, read_published, summarise, write_tables
from genossm.config import compose as compose_verb
from genossm.config import conf_folder
from genossm.config import launch as launch_verb
from genossm.data.protocols import PROTOCOLS
from genossm.files import write_atomically
from genossm.source import find

logger = logging.getLogger(__name__)

TRIES = 2
"""How often a cell is tried whose process fails or is killed before it is marked failed."""
LAUNCHERS = ("local", "slurm")
BASELINES = ("none", "kmers", "layers")
_PRINTED = tuple(name for name in COLUMNS if name != "min to max")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of the grid; everything that it needs can be sent to another process."""

    task: str
    seed: int
    rate: float
    overrides: tuple[str, ...]
    folder: str
    """Where result.json goes, or failed.txt."""

    @property
    def result(self) -> Path:
        """File that a finished run leaves."""
        return Path(self.folder) / "result.json"

    @property
    def failure(self) -> Path:
        """File that a run leaves that failed for good."""
        return Path(self.folder) / "failed.txt"


@dataclass(frozen=True)
class EvaluateResult:
    """What a suite gives back: the folder of its tables, their rows, and what stands below them."""

    folder: Path
    rows: list[Row]
    footer: list[str]

    def summary(self) -> dict[str, Any]:
        """Return plain values, for machines."""
        return {"folder": str(self.folder), "rows": [asdict(row) for row in self.rows], "footer": self.footer}


def evaluate(config: DictConfig) -> EvaluateResult:
    """Run what `conf/evaluate.yaml` describes, or go on with it where it was stopped.

    Args:
        config: the composed config; `genossm.evaluate.compose` makes one from overrides.

    Returns:
        The folder, which holds cells/ and table.csv, table.md and table.html, the rows and the footer.

    Raises:
        ValueError: a value is wrong; the message says which and what is allowed.
        FileNotFoundError: the pretrained model is not there.
    """
    for name, allowed in (("launcher", LAUNCHERS), ("baselines", BASELINES)):
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {config[name]!r}.")
    model, protocol = _model(config)[0], config.suite.protocol
    # A pretrained model is what its folder is, whatever the model group says.
    model = str(config.pretrained or config.model.pretrained or model)
    folder = Path(config.output) / str(
        config.name or re.sub(r"[^\w.-]+", "_", f"{config.suite.name}_{protocol}_{model}")
    )
    cells = grid(config, folder)
    for cell in cells:
        _refuse_changed(cell)
    if config.retry_failed:
        for cell in cells:
            cell.failure.unlink(missing_ok=True)
    part, parts = _part(config.part)
    waiting = [cell for cell in cells[part::parts] if not cell.result.exists() and not cell.failure.exists()]
    if waiting and config.pretrained:
        # One answer now instead of one a cell.
        find(config.pretrained)
    logger.info("%d of %d cells are left to run", len(waiting), len(cells[part::parts]))
    if config.launcher == "slurm":
        launch_slurm(waiting, folder, config)
    else:
        launch(waiting, int(config.jobs))
    if config.part is not None:
        logger.info("part %s is done; the same command without part writes the table", config.part)
        return EvaluateResult(folder, [], [])
    rows: list[Row] = []
    footer = [f"protocol {protocol}: {PROTOCOLS[protocol]}; of several rates, the one with the best validation mean"]
    shown = str(config.name or _short(model))
    if shown != model:
        footer.append(f"{shown}: {model}")
    for task in dict.fromkeys(cell.task for cell in cells):
        mine = [cell for cell in cells if cell.task == task]
        found = [(cell.rate, json.loads(cell.result.read_text())) for cell in mine if cell.result.exists()]
        failed = [cell for cell in mine if cell.failure.exists()]
        footer += [
            f"failed: {c.task}, seed {c.seed}, lr {c.rate:g}: {c.failure.read_text().strip()[:200]}" for c in failed
        ]
        if found:
            ours = summarise(task, shown, found, len(failed))
            together = average(task, shown, [c.result for c in mine if c.rate == ours.rate and c.result.exists()])
            rows += [ours] if together is None else [ours, together]
        about = describe(mine[0], config, rows[-1].metric if found else None)
        rows += [Row(**row) for row in about["rows"]]
        rows += read_published(config.suite.benchmark, config.suite.protocol, task)
        footer += [f"{task}: {line}" for line in about["leaks"]]
    write_tables(folder, f"{config.suite.name}, protocol {protocol}", rows, footer)
    report(rows, footer, folder)
    return EvaluateResult(folder, rows, footer)


def _short(model: str) -> str:
    """Return a name for a model: of the folder that a run left, the run's own folder."""
    parts = Path(model).parts
    return "/".join(parts[-3:-1] if len(parts) > 2 and parts[-1] == "model" else parts[-2:])


def _part(text: str | None) -> tuple[int, int]:
    """Return i and n of "i/n"; (0, 1) of None."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"part must be i/n with i from 0 to n - 1, like 0/4; got {text!r}.")
    return int(found[1]), int(found[2])


def _model(config: DictConfig) -> tuple[str, list[str]]:
    """Return the model's name in conf/model and the overrides that make it what the config says."""
    for file in sorted((conf_folder() / "model").glob("*.yaml")):
        shipped = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))
        if shipped["_target_"] == config.model._target_:
            values = cast(dict[str, Any], OmegaConf.to_container(config.model, resolve=True))
            changed = {key: value for key, value in values.items() if value != shipped.get(key)}
            return file.stem, [f"model={file.stem}", *(f"model.{k}={json.dumps(v)}" for k, v in changed.items())]
    raise ValueError(f"No file of conf/model builds a {config.model._target_}.")


def _context(config: DictConfig, task: str) -> list[str]:
    """Return what raises a fresh model's context to the longest row of a task, where the model has one."""
    needed, own = config.suite.lengths.get(task, 0), config.model.get("max_length")
    fresh = not (config.pretrained or config.model.pretrained)
    return [f"model.max_length={needed}"] if fresh and own is not None and own < needed else []


def _refuse_changed(cell: Cell) -> None:
    """Refuse to go on with a cell that was begun with other settings; note those of a new one."""
    noted = Path(cell.folder) / "settings.json"
    text = json.dumps(cell.overrides, indent=1) + "\n"
    if noted.exists() and noted.read_text() != text:
        before, now = set(json.loads(noted.read_text())), set(cell.overrides)
        raise ValueError(
            f"{cell.folder} was begun with other settings: {', '.join(sorted(before - now)) or 'fewer'} instead of"
            f" {', '.join(sorted(now - before)) or 'none'}. Give this evaluation a name of its own (name=...)."
        )
    noted.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(noted, lambda path: path.write_text(text))


def grid(config: DictConfig, folder: Path) -> list[Cell]:
    """Return the cells of the grid: every task, seed and learning rate.

    Raises:
        ValueError: there is no task, seed or rate, or an unknown task is asked for.
    """
    unknown = sorted(set(config.only or ()) - set(config.suite.tasks))
    if unknown:
        raise ValueError(
            f"{config.suite.name} has no task {', '.join(unknown)}; it has: {', '.join(config.suite.tasks)}."
        )
    model = _model(config)[1]
    seeds, rates = list(config.seeds or config.suite.seeds), list(config.rates or config.suite.rates)
    cells: list[Cell] = []
    for task in [t for t in config.suite.tasks if not config.only or t in config.only]:
        for rate in rates:
            for seed in seeds:
                own = folder / "cells" / task / f"lr{rate:g}_seed{seed}"
                overrides = [
                    "experiment=finetune",
                    *model,
                    *config.suite.common,
                    *config.suite.tasks[task],
                    *_context(config, task),
                    f"protocol={config.suite.protocol}",
                    f"seed={seed}",
                    f"optim.lr={rate}",
                    f"output='{own}'",
                    "name=run",
                    "quiet=true",
                    *([f"model.pretrained='{config.pretrained}'"] if config.pretrained else []),
                    *config.overrides,
                ]
                cells.append(
                    Cell(task=task, seed=seed, rate=rate, overrides=tuple(map(str, overrides)), folder=str(own))
                )
    if not cells:
        raise ValueError("The grid is empty: give at least one task, seed and rate.")
    return cells


def run_cell(cell: Cell) -> None:
    """Train one cell and leave its result.json; its checkpoints are deleted."""
    from genossm.finetune import run
    from genossm.train import compose as compose_train

    shutil.rmtree(Path(cell.folder) / "run", ignore_errors=True)
    result = run(compose_train(list(cell.overrides)))
    text = (result.folder / "result.json").read_text()
    shutil.rmtree(result.folder / "checkpoints", ignore_errors=True)
    write_atomically(cell.result, lambda path: path.write_text(text))


def launch(cells: Sequence[Cell], jobs: int = 1, work: Callable[[Cell], None] = run_cell) -> None:
    """Run cells on this host, `jobs` at a time, each job in a process of its own.

    A process that is killed takes one cell with it: that cell is tried once more, then marked failed, and the rest goes
    on. One job runs in this process; killed, the same command goes on where it was. A user's mistake (ValueError and
    its like) in the first try is not tried again.

    Raises:
        ValueError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}.")
    if jobs == 1:
        for cell in cells:
            _try(cell, lambda cell=cell: work(cell))
        return
    left: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        left.put(cell)

    def serve() -> None:
        pool: ProcessPoolExecutor | None = None

        def in_process(cell: Cell) -> None:
            nonlocal pool
            pool = pool or ProcessPoolExecutor(1, get_context("spawn"))
            try:
                pool.submit(work, cell).result()
            except RuntimeError:
                # A pool whose process was killed is spent (BrokenProcessPool); the next try starts another.
                pool.shutdown(wait=False)
                pool = None
                raise

        while True:
            try:
                cell = left.get_nowait()
            except queue.Empty:
                break
            _try(cell, lambda cell=cell: in_process(cell))
        if pool is not None:
            pool.shutdown()

    threads = [threading.Thread(target=serve) for _ in range(min(jobs, len(cells)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _try(cell: Cell, work: Callable[[], None]) -> None:
    reason = ""
    for number in range(TRIES):
        error = _error_of(work)
        if error is None:
            return
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s, seed %d: try %d failed: %s", cell.task, cell.seed, number + 1, reason)
        if isinstance(error, ValueError | KeyError | OSError):
            break
    write_atomically(cell.failure, lambda path: path.write_text(reason + "\n"))


def _error_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def launch_slurm(cells: Sequence[Cell], folder: Path, config: DictConfig) -> None:
    """Run each cell as a job of a cluster, through submitit; failed ones are submitted once more.

    Raises:
        ValueError: submitit is not installed.
    """
    from genossm.ops.backend import installed

    if not installed("submitit"):
        raise ValueError("launcher=slurm needs submitit: pip install 'genossm[sweep]'.")
    import submitit

    options: dict[str, Any] = OmegaConf.to_container(config.slurm, resolve=True)  # type: ignore[assignment]
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=options.pop("cluster"))
    executor.update_parameters(**options)
    jobs = [(cell, executor.submit(run_cell, cell)) for cell in cells]
    for cell, job in jobs:
        tries = iter([job.result])
        _try(cell, lambda cell=cell, tries=tries: next(tries, lambda: executor.submit(run_cell, cell).result())())


def describe(cell: Cell, config: DictConfig, metric: str | None) -> dict[str, Any]:
    """Return the baselines and leaks of a task, from the file where they are kept or measured now."""
    path = Path(cell.folder).parent / f"about_{config.baselines}.json"
    if path.exists():
        return json.loads(path.read_text())
    from hydra.utils import instantiate

    from genossm.data.leakage import find_leaks
    from genossm.data.protocols import divide
    from genossm.train import compose as compose_train

    own = compose_train(list(cell.overrides))
    data = instantiate(own.data, _convert_="all").load()
    splits, _ = divide(data, own.protocol, cell.seed, **OmegaConf.to_container(own.holdout))  # type: ignore[arg-type]
    about: dict[str, Any] = {"leaks": [str(leak) for leak in find_leaks(splits["train"], splits["test"], data.target)]}
    about["rows"] = _probe(own, data.target, splits, config, cell.task, metric)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(about, indent=1) + "\n"))
    return about


def _probe(
    own: DictConfig, target: Any, splits: dict[str, Any], config: DictConfig, task: str, metric: str | None
) -> list[dict[str, Any]]:
    if config.baselines == "none" or metric is None or target.kind not in ("binary", "multiclass", "regression"):
        return []
    from genossm.probe import probe_kmers, probe_layers
    from genossm.train import build_model

    probes = probe_kmers(splits["train"], splits["test"], target)
    if config.baselines == "layers":
        probes += probe_layers(build_model(own.model), splits["train"], splits["test"], target)
    return [
        {
            "task": task,
            "model": f"{p.features}, {p.method}",
            "metric": metric,
            "mean": p.metrics[metric],
            "source": "probe",
        }
        for p in probes
    ]


def report(rows: Sequence[Row], footer: Sequence[str], folder: Path) -> None:
    """Print the table, without the extremes, which 80 columns have no room for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in _PRINTED:
        shown.add_column(name, overflow="fold")
    for row in rows:
        by_name = dict(zip(COLUMNS, row.cells(), strict=True))
        shown.add_row(*(by_name[name] for name in _PRINTED))
    console = Console(highlight=False, soft_wrap=True)
    console.print(shown)
    for line in footer:
        console.print(line)
    console.print(str(folder))


def compose(overrides: list[str]) -> DictConfig:
    """Return the checked config of `genossm evaluate OVERRIDES`."""
    return compose_verb("evaluate", overrides)


def main() -> None:
    """Run `evaluate` on the overrides of the command line."""
    launch_verb("evaluate", evaluate)
