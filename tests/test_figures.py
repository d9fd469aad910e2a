import json

import numpy as np
import pytest

from genossm import figures, tables
from genossm.plot import plot

RNG = np.random.default_rng(0)


def table_of(kind, folder):
    """A small table of each kind, as the verbs write them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / {"loss": "metrics.csv", "bars": "b.tsv", "scaling": "s.json"}.get(kind, f"{kind}.parquet")
    if kind == "loss":
        path.write_text("step,train/bits,val/bits\n1,2.0,\n2,1.9,1.95\n")
    elif kind == "bars":
        path.write_text("task\tmodel\tscore\na\tm\t0.5\na\tn\t0.75\nb\tm\t0.25\n")
    elif kind == "scaling":
        path.write_text(json.dumps([{"length": 2**k, "model": m, "ms": k} for k in (1, 2) for m in "ab"]))
    elif kind == "embedding":
        vectors = tables.vectors(RNG.normal(size=(9, 4)), "float32")
        pq.write_table(pa.table({"name": list("abcdefghi"), "label": list("xxxyyyzzz"), "embedding": vectors}), path)
    elif kind == "logo":
        rows = [(at, ref, alt, 0.1 * at - 0.2) for at, ref in enumerate("ACGTA") for alt in "ACGT" if alt != ref]
        columns = dict(zip(("position", "ref", "alt", "llr"), zip(*rows, strict=True), strict=True))
        same = {"region": [0] * 15, "chrom": ["c"] * 15, "strand": ["+"] * 15}
        pq.write_table(pa.table({**same, **{k: list(v) for k, v in columns.items()}}), path)
    else:
        same = {"chrom": ["1", "1", "2"], "pos": [5, 9, 4], "alt": list("ACG")}
        pq.write_table(pa.table({**same, "llr": [0.5, None, -1.0]}), path)
    return path


@pytest.mark.parametrize("kind", ["loss", "bars", "scaling", "embedding", "logo", "track"])
def test_columns_tell_the_kind_and_every_format_is_written(kind, tmp_path):
    table = table_of(kind, tmp_path)
    endings = {".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!doctype html>"}
    for ending, start in endings.items() if kind == "logo" else [(".html", endings[".html"])]:
        result = plot(table, out=tmp_path / f"f{ending}", color="label" if kind == "embedding" else None)
        assert result.kind == kind
        assert result.path.read_bytes().startswith(start)


def test_figures_hold_the_numbers(tmp_path):
    from genossm import figures

    drawn = figures.bars([{"task": "a", "model": "m", "score": s} for s in (0.5, 1.0)], "score").axes[0]
    assert drawn.patches[0].get_height() == pytest.approx(0.75)
    points = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    projected, _ = figures._projected(points, "pca")
    np.testing.assert_allclose(np.abs(projected), np.abs(points[:, :2]), atol=1e-12)


def test_bad_input(tmp_path):
    table = table_of("bars", tmp_path)
    plot(table, out=tmp_path / "f.png")
    for values, message in (
        ({"out": tmp_path / "f.png"}, "--overwrite"),
        ({"out": tmp_path / "f.doc"}, "must end in"),
        ({"out": tmp_path / "g.png", "kind": "pie"}, "loss, bars"),
        ({"out": tmp_path / "g.png", "column": "best"}, "there are: task, model, score"),
    ):
        with pytest.raises((ValueError, KeyError, FileExistsError), match=message):
            plot(table, **values)
    with pytest.raises(ValueError, match="pca or umap"):
        plot(table_of("embedding", tmp_path), out=tmp_path / "g.png", method="tsne")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="fit no figure"):
        plot(tmp_path / "x.csv", out=tmp_path / "g.png")


def test_umap_keeps_what_is_far_apart_apart():
    pytest.importorskip("umap", exc_type=ImportError)
    from genossm import figures

    values = RNG.normal(size=(60, 8))
    values[30:] += 9
    points, labels = figures._projected(values, "umap")
    assert labels == ("UMAP 1", "UMAP 2")
    assert np.linalg.norm(points[:30].mean(0) - points[30:].mean(0)) > 4 * points[:30].std()


def test_umap_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("genossm.ops.backend.installed", lambda name: name != "umap")
    with pytest.raises(ValueError, match=r"genossm\[umap\]"):
        plot(table_of("embedding", tmp_path), out=tmp_path / "g.png", method="umap")


def test_a_run_that_stays_above_two_bits_is_drawn_too():
    rows = {
        9: {"train/bits": 3.06},
        19: {"train/bits": 2.69, "val/bits": 2.66},
        29: {"train/bits": 2.5, "val/bits": 2.43},
    }
    (axes,) = figures.loss(rows, {}).axes
    bottom, top = axes.get_ylim()
    assert bottom < 2.43
    assert top > 2.66
