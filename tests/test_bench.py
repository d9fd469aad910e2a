import json
import time

import pytest
import torch

from genossm.bench import bench, topics
from genossm.benchmarks.base import Comparison, measure, peak_mib
from genossm.plot import plot

CPU = torch.device("cpu")


def test_ratio_is_how_many_times_as_fast_as_the_first():
    def build():
        x = torch.randn(400, 400)
        return {"four": lambda: [x @ x for _ in range(40)], "one": lambda: [x @ x for _ in range(10)]}

    four, one = measure(Comparison(name="products", build=build, tokens=10, memory=False), CPU, seconds=0.5)
    assert four.ratio == 1
    assert 2 < one.ratio < 8
    assert one.tokens_per_second == pytest.approx(10 / one.seconds)


def test_peak_is_what_a_run_takes_above_its_inputs():
    kept = torch.ones(16 << 20)
    peak = peak_mib(lambda: kept + 1, CPU)
    if peak is None:
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    assert 60 < peak < 80


def test_what_takes_long_runs_once_and_what_is_fast_several_times_a_round(tmp_path):
    def build():
        def run(name, seconds):
            # In a file, for memory is measured in a process of its own.
            with (tmp_path / name).open("a") as file:
                file.write("x")
            time.sleep(seconds)

        return {"slow": lambda: run("slow", 0.02), "middling": lambda: run("m", 0.02), "fast": lambda: run("f", 0)}

    told = []
    rows = measure(Comparison(name="c", build=build, once=("slow",)), CPU, seconds=0.1, report=told.append)
    assert [row.variant for row in rows] == ["slow", "middling", "fast"]
    assert (tmp_path / "slow").read_text() == "x"
    assert len((tmp_path / "f").read_text()) > len((tmp_path / "m").read_text()) > 3
    assert rows[0].runs == 1
    assert rows[2].ratio > 2
    assert "slow, its only run" in told


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"there are: .*ops"):
        bench("opps")
    with pytest.raises(ValueError, match="'nothing'"):
        bench("ops", only="nothing")
    with pytest.raises(ValueError, match="memory must be between 0"):
        bench("ops", memory=1e6)


@pytest.mark.parametrize("topic", topics())
def test_every_topic_lists_comparisons_with_distinct_names(topic):
    import importlib

    names = [c.name for c in importlib.import_module(f"genossm.benchmarks.{topic}").comparisons(CPU)]
    assert names
    assert len(names) == len(set(names))


def test_rows_are_written(tmp_path):
    rows = bench("ops", only="16,384, forward", device="cpu", seconds=0.1, out=tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    assert {row["variant"] for row in rows} == {"published form", "genossm"}


def test_measuring_goes_on_where_a_file_ends(tmp_path, monkeypatch):
    from genossm.benchmarks import generation

    monkeypatch.setattr(generation, "CONTEXTS", (32, 64))
    monkeypatch.setattr(generation, "STEPS", 2)
    out = tmp_path / "generation.json"
    options = {"device": "cpu", "seconds": 0.01, "out": out, "resume": True}
    first = bench("generation", only="Mamba 32", **options)
    both = bench("generation", only="Mamba", **options)
    assert both[0] == first[0]
    assert [row["comparison"] for row in json.loads(out.read_text())["rows"]] == ["Mamba 32", "Mamba 64"]
    assert plot(out, out=tmp_path / "again.html").kind == "generation"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds generation on"):
        bench("load", **options)
    with pytest.raises(ValueError, match="--out"):
        bench("generation", resume=True)
