"""A suite runs, resumes, survives killed workers, and stands beside published numbers of the same protocol alone."""

import json
import os
from pathlib import Path

import pytest

from genossm.comparison import Row, read_published, summarise, write_tables
from genossm.config import conf_folder
from genossm.data.genomic_benchmarks import TASKS
from genossm.data.nucleotide_transformer import ORIGINAL, REVISED
from genossm.evaluate import Cell, compose, evaluate, grid, launch
from genossm.train import compose as compose_train

TINY = ["trainer.accelerator=cpu", "model.d_model=8", "model.n_layer=1", "model.max_length=64", "data.length=40"]
SUITES = sorted(path.stem for path in (conf_folder() / "suite").glob("*.yaml"))


def quick(tmp_path, *more):
    overrides = ",".join(f'"{word}"' for word in [*TINY, "epochs=1"])
    return compose(["suite=quick", "only=[splice_sites]", f"output={tmp_path}", f"overrides=[{overrides}]", *more])


def test_suite_runs_and_resumes(tmp_path):
    result = evaluate(quick(tmp_path, "rates=[0.003]"))
    ours, *probes = result.rows
    assert (ours.task, ours.metric, ours.runs, ours.source) == ("splice_sites", "accuracy", 1, "ours, given")
    assert ours.interval_low <= ours.mean <= ours.interval_high
    assert {p.model for p in probes} == {"k-mers 1-5, linear", "k-mers 1-5, knn"}
    assert any("identical to a train row" in line for line in result.footer)
    assert {"table.csv", "table.md", "table.html"} <= {p.name for p in result.folder.iterdir()}
    cell = next(result.folder.glob("cells/*/*/result.json"))
    values = json.loads(cell.read_text())
    values["metrics"]["test/accuracy"] = 0.123
    cell.write_text(json.dumps(values))
    assert evaluate(quick(tmp_path, "rates=[0.003]")).rows[0].mean == 0.123


def cells(tmp_path, *names):
    return [Cell(task=n, seed=1, rate=0.1, overrides=(), folder=str(tmp_path / n)) for n in names]


def work(cell):
    Path(cell.folder).mkdir(exist_ok=True)
    tries = Path(cell.folder) / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if cell.task == "killed" or (cell.task == "shaky" and tries.read_text() == "x"):
        os._exit(9)
    if cell.task == "wrong":
        raise ValueError("no such file")
    cell.result.write_text("{}")


def test_killed_worker_is_tried_once_more_and_the_rest_goes_on(tmp_path):
    found = cells(tmp_path, "killed", "fine", "shaky", "wrong")
    launch(found, jobs=2, work=work)
    assert [c.task for c in found if c.result.exists()] == ["fine", "shaky"]
    assert [c.task for c in found if c.failure.exists()] == ["killed", "wrong"]
    assert (tmp_path / "killed" / "tries").read_text() == "xx"
    assert (tmp_path / "wrong" / "tries").read_text() == "x"
    assert "no such file" in found[3].failure.read_text()


def finished(rate, val, test, seed=1):
    metrics = {"val/accuracy": val, "test/accuracy": test}
    return rate, {
        "monitor": "val/accuracy",
        "metrics": metrics,
        "interval": [test - 0.1, test + 0.1],
        "protocol": "given",
    }


def test_validation_chooses_the_rate_never_test():
    row = summarise("t", "m", [finished(0.1, 0.8, 0.5), finished(0.1, 0.9, 0.7), finished(0.2, 0.7, 0.99)], failed=1)
    assert (row.rate, row.mean, row.low, row.high, row.runs, row.failed) == (0.1, 0.6, 0.5, 0.7, 2, 1)
    assert row.sd == pytest.approx(0.1414, abs=1e-3)
    assert "(1 failed)" in row.cells()[5]


def test_published_numbers_are_of_the_same_protocol():
    honest = {r.model: r.mean for r in read_published("genomic_benchmarks", "caduceus_cv", "human_enhancers_cohn")}
    best = {r.model: r.mean for r in read_published("genomic_benchmarks", "hyenadna", "human_enhancers_cohn")}
    assert honest["Caduceus-Ph 470K" if "Caduceus-Ph 470K" in honest else "Caduceus-Ph"] == 0.747
    assert best["HyenaDNA"] == 0.742
    assert not read_published("genomic_benchmarks", "nt_kfold", "human_enhancers_cohn")
    assert len(read_published("nucleotide_transformer", "caduceus_cv", "H3K14ac")) == 6


def test_tables_hold_every_row(tmp_path):
    rows = [Row(task="a<b", model="m|n", metric="mcc", mean=0.5, sd=0.1, low=0.4, high=0.6)]
    write_tables(tmp_path, "title", rows, ["a note"])
    assert "0.500 ± 0.100" in (tmp_path / "table.md").read_text()
    page = (tmp_path / "table.html").read_text()
    assert "a&lt;b" in page
    assert "<line" in page
    assert "a<b" in (tmp_path / "table.csv").read_text()


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_composes_with_every_task(suite, tmp_path):
    config = compose([f"suite={suite}", f"output={tmp_path}"])
    first = {cell.task: cell for cell in grid(config, tmp_path)}
    for cell in list(first.values())[:3]:
        own = compose_train(list(cell.overrides))
        assert own.protocol == config.suite.protocol
    wanted = {"nucleotide_transformer": ORIGINAL, "nt_revised": REVISED}.get(suite, TASKS)
    assert suite == "quick" or set(first) == set(wanted)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=[exons]", "has no task exons; it has: splice_sites, regions"),
        ("launcher=pbs", "launcher must be one of local, slurm"),
        ("baselines=svm", "baselines must be one of"),
        ("jobs=0", "jobs must be at least 1"),
    ],
)
def test_mistakes_are_named(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(quick(tmp_path, override))
