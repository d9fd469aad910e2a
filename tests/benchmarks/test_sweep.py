import math

import pytest
import torch

from genossm.bench import bench
from genossm.benchmarks import longest, scaling
from genossm.benchmarks.base import OUT_OF_MEMORY
from genossm.benchmarks.sweep import Point, foresee, needless
from genossm.plot import plot

CPU = torch.device("cpu")


def point(length, series="s", **options):
    return Point(name=f"{series} {length}", series=series, length=length, build=dict, **options)


def row(length, seconds=math.nan, variant="v", series="s", mib=None):
    return {"comparison": f"{series} {length}", "variant": variant, "seconds": seconds, "peak_mib": mib}


def test_the_next_length_is_foreseen_from_those_before():
    rows = [row(4, 1.0, mib=10), row(8, 9.0, mib=16), row(8, 4.0, "other", mib=9), row(16, 100.0, series="t")]
    assert foresee(point(16), rows[:1]).seconds == 4
    assert foresee(point(16, power=2), rows[:1]).seconds == 16
    both = foresee(point(16), rows)
    assert both.seconds == 4 * 4
    assert both.mib == 32
    assert foresee(point(4), rows) == foresee(point(16, series="u"), rows)
    assert foresee(point(4), rows).seconds == 0


def test_what_did_not_fit_ends_a_series_and_what_ran_ends_the_way_down():
    rows = [row(8, 1.0), row(16, variant=OUT_OF_MEMORY)]
    assert needless(point(16), rows)
    assert needless(point(32), rows)
    assert not needless(point(32, series="t"), rows)
    assert not needless(point(4), rows)
    assert needless(point(4, largest=True), rows)
    assert not needless(point(8, largest=True), rows[1:])
    assert needless(point(8, largest=True), [row(16, variant="not run: 0 s left")])


def test_longest_doubles_until_memory_ends(monkeypatch, tmp_path):
    tiny = {"model_type": "cnn", "d_model": 32, "n_layer": 1}
    monkeypatch.setattr(longest, "BACKBONES", {"Tiny": (tiny, 1 << 12)})
    monkeypatch.setattr(longest, "_SHORT", 1 << 11)
    monkeypatch.setattr(longest, "_LONG", 1 << 20)
    rows = bench("longest", device="cpu", memory=0.1, limit=60, out=tmp_path / "rows.json")
    assert [row["comparison"] for row in rows[:2]] == ["Tiny 2048", "Tiny 4096"]
    assert rows[-1]["variant"] == OUT_OF_MEMORY
    assert all(row["peak_mib"] < 0.1 * 1024 for row in rows[:-1])
    (line,) = longest.summary(rows)
    assert line.startswith(f"Tiny: {int(rows[-2]['comparison'].split()[1]):,} tokens in ")
    assert line.endswith(": out of memory")


def test_scaling_leaves_out_what_the_time_does_not_reach_and_goes_on_later(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "LENGTHS", {"cpu": (16, 32, 1 << 21)})
    monkeypatch.setattr(scaling, "SHAPES", {"mamba": {"model_type": "cnn", "d_model": 8, "n_layer": 1}})
    out = tmp_path / "rows.json"
    first = bench("scaling", device="cpu", seconds=0.01, limit=20, out=out)
    (left_out,) = [row for row in first if row["comparison"] == "mamba training 2097152"]
    assert left_out["variant"].startswith("not run: ")
    assert plot(out, out=tmp_path / "again.png").kind == "lengths"
    assert len(scaling.summary(first)) == 2
    monkeypatch.setattr(scaling, "LENGTHS", {"cpu": (16, 32, 64)})
    again = bench("scaling", device="cpu", seconds=0.01, out=out, resume=True)
    assert again[: len(first) - 2] == first[:-2]
    assert {row["comparison"] for row in again[len(first) - 2 :]} == {"mamba training 64", "mamba inference 64"}


def test_a_failure_is_a_row_of_a_series(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(scaling, "LENGTHS", {"cpu": (16,)})
    monkeypatch.setattr(scaling, "SHAPES", {"mamba": {}})
    monkeypatch.setattr(scaling, "_build", fail)
    rows = bench("scaling", device="cpu")
    assert [row["variant"] for row in rows] == ["failed: no kernel"] * 2
    assert "for this" in caplog.text


def test_one_slow_run_does_not_move_the_exponent():
    rows = [
        {"comparison": f"mamba training {n}", "variant": "a", "seconds": n * (30 if n == 1 << 20 else 1)}
        for n in (1 << 10, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
    ]
    assert scaling.exponents(rows) == {"mamba training": pytest.approx(1)}
    assert scaling.exponents(rows[:2]) == {"mamba training": pytest.approx(1)}
    assert scaling.exponents(rows[:1]) == {}
