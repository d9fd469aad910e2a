"""A suite runs, resumes, survives killed workers, and stands beside published numbers of the same protocol alone."""

import csv
import json
import os
from pathlib import Path

import pytest

from genossm.comparison import Row, average, read_published, summarise, write_tables
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
    result = evaluate(quick(tmp_path, "rates=[0.003]", "seeds=[1,2]"))
    ours, together, *probes = result.rows
    assert (ours.task, ours.metric, ours.runs, ours.source) == ("splice_sites", "accuracy", 2, "ours, given")
    assert together.model == f"{ours.model}, mean of 2 seeds"
    assert ours.interval_low <= ours.mean <= ours.interval_high
    assert {p.model for p in probes} == {"k-mers 1-5, linear", "k-mers 1-5, knn"}
    assert any("identical to a train row" in line for line in result.footer)
    assert {"table.csv", "table.md", "table.html"} <= {p.name for p in result.folder.iterdir()}
    cell = next(result.folder.glob("cells/*/*/result.json"))
    values = json.loads(cell.read_text())
    values["metrics"]["test/accuracy"] = 0.123
    cell.write_text(json.dumps(values))
    assert evaluate(quick(tmp_path, "rates=[0.003]", "seeds=[1,2]")).rows[0].low == 0.123


def test_a_pretrained_model_that_is_not_there_is_told_before_any_cell_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/model"):
        evaluate(quick(tmp_path, f"pretrained={tmp_path}/nowhere/model"))
    assert not list(tmp_path.glob("**/failed.txt"))


def test_parts_of_a_sweep_share_the_grid_and_leave_the_table_to_the_end(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("genossm.evaluate.launch", lambda cells, jobs: ran.append([(c.task, c.rate) for c in cells]))
    config = [f"output={tmp_path}", "suite=quick", "rates=[0.1,0.2,0.3]"]
    for part in ("part=0/2", "part=1/2"):
        assert evaluate(compose([*config, part])).rows == []
    assert sorted(ran[0] + ran[1]) == sorted((t, r) for t in ("regions", "splice_sites") for r in (0.1, 0.2, 0.3))
    assert abs(len(ran[0]) - len(ran[1])) <= 1


@pytest.mark.parametrize(("model", "raised"), [("hyenadna", True), ("caduceus", False)])
def test_context_is_raised_for_long_tasks_of_models_that_have_one(model, raised, tmp_path):
    found = {
        cell.task: [word for word in cell.overrides if "max_length" in word]
        for cell in grid(compose(["suite=genomic_benchmarks", f"model={model}", "seeds=[1]", "rates=[0.1]"]), tmp_path)
    }
    assert found["dummy_mouse_enhancers_ensembl"] == (["model.max_length=4776"] if raised else [])
    assert found["drosophila_enhancers_stark"] == (["model.max_length=3237"] if raised else [])
    assert found["human_enhancers_cohn"] == []
    pretrained = compose(["suite=genomic_benchmarks", "model=hyenadna", "pretrained=folder", "seeds=[1]"])
    assert not any("max_length" in word for cell in grid(pretrained, tmp_path) for word in cell.overrides)


def test_model_is_chosen_and_changed_as_for_train(tmp_path):
    config = compose(["suite=quick", "model=caduceus", "model.d_model=8", "model.rcps=true"])
    own = compose_train(list(grid(config, tmp_path)[0].overrides))
    assert own.model._target_.endswith("CaduceusConfig")
    assert (own.model.d_model, own.model.rcps, own.model.n_layer) == (8, True, config.model.n_layer)


def test_cells_begun_with_other_settings_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("genossm.evaluate.launch", lambda cells, jobs: None)
    evaluate(compose(["suite=quick", f"output={tmp_path}", "part=0/1"]))
    with pytest.raises(ValueError, match=r"begun with other settings: .*instead of .*model.d_model=8"):
        evaluate(compose(["suite=quick", f"output={tmp_path}", "part=0/1", "model.d_model=8"]))


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
        "target": "multiclass",
    }


def test_validation_chooses_the_rate_never_test():
    row = summarise("t", "m", [finished(0.1, 0.8, 0.5), finished(0.1, 0.9, 0.7), finished(0.2, 0.7, 0.99)], failed=1)
    assert (row.rate, row.mean, row.low, row.high, row.runs, row.failed) == (0.1, 0.6, 0.5, 0.7, 2, 1)
    assert row.sd == pytest.approx(0.1414, abs=1e-3)
    assert "(1 failed)" in row.cells()[5]


def left(folder, kind, names, truth, answers):
    """Write what a run leaves."""
    (folder / "run" / "time").mkdir(parents=True)
    values = {"monitor": "val/loss", "target": kind, "names": names, "protocol": "given"}
    (folder / "result.json").write_text(json.dumps(values))
    lines = [["row", "name", "interval", "target", *names]]
    lines += [[i, "", "", t, *a] for i, (t, a) in enumerate(zip(truth, answers, strict=True))]
    with (folder / "run" / "time" / "predictions.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(lines)
    return folder / "result.json"


def test_runs_are_averaged_as_one_model(tmp_path):
    truth = ["a", "b", "b", "a"]
    first = left(tmp_path / "1", "binary", ["a", "b"], truth, [[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.4, 0.6]])
    second = left(tmp_path / "2", "binary", ["a", "b"], truth, [[0.8, 0.2], [0.1, 0.9], [0.7, 0.3], [0.3, 0.7]])
    row = average("t", "m", [first, second])
    # Each alone has one or two rows wrong; together the last alone is.
    assert row is not None
    assert (row.model, row.metric, row.mean) == ("m, mean of 2 seeds", "accuracy", 0.75)
    assert row.interval_low is not None
    assert row.interval_low <= 0.75
    values = left(tmp_path / "3", "regression", ["v"], ["1", "2", "4"], [[1.5], [1.0], [4.0]])
    others = left(tmp_path / "4", "regression", ["v"], ["1", "2", "4"], [[0.5], [3.0], [4.0]])
    exact = average("t", "m", [values, others])
    assert exact is not None
    assert exact.mean == pytest.approx(1.0)


def test_runs_of_other_test_rows_are_not_averaged(tmp_path):
    first = left(tmp_path / "1", "binary", ["a", "b"], ["a", "b"], [[0.9, 0.1], [0.6, 0.4]])
    second = left(tmp_path / "2", "binary", ["a", "b"], ["b", "b"], [[0.9, 0.1], [0.6, 0.4]])
    assert average("t", "m", [first, second]) is None
    assert average("t", "m", [first]) is None
    (tmp_path / "2" / "run" / "time" / "predictions.csv").unlink()
    assert average("t", "m", [first, second]) is None


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
        ("part=2/2", "part must be i/n"),
        ("part=half", "part must be i/n"),
        ("epochs=1", r"Keys of its runs go into overrides: 'overrides=\[\"epochs=…\"\]'"),
    ],
)
def test_mistakes_are_named(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(quick(tmp_path, override))
