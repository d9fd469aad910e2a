"""GenomicBenchmarks from interval files and archives; offline, cached, classes by name."""

import shutil
import zipfile

import pytest

from genossm.data import genomic_benchmarks
from genossm.data.genomic_benchmarks import TASKS, GenomicBenchmark
from genossm.dna import alphabet
from genossm.dna.genome import Genome


def test_intervals_are_cut_from_any_fasta_and_kept(tmp_path):
    task = GenomicBenchmark.tiny(tmp_path)
    data = task.load()
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 60, "val": 0, "test": 20}
    genome = Genome(task.fasta)
    for example in data.splits["test"]:
        assert example.sequence == alphabet.to_text(genome.fetch(example.interval))
        gc = sum(example.sequence.count(letter) for letter in "GC") / 50
        assert (gc > 0.5) == (data.target.names[example.target] == "positive")
    (tmp_path / "genome.fa.tokens").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "human_enhancers_cohn")
    again = task.load()
    assert again.splits == data.splits
    assert again.notes == data.notes


def test_missing_contigs_are_counted(tmp_path):
    task = GenomicBenchmark.tiny(tmp_path)
    text = (tmp_path / "genome.fa").read_text()
    (tmp_path / "genome.fa").write_text(text[: text.index(">2")])
    data = task.load()
    assert sum(map(len, data.splits.values())) == 40
    assert any("40 rows on 1 contigs that the FASTA lacks (chr2 40" in note for note in data.notes)


def test_offset_moves_every_row(tmp_path):
    task = GenomicBenchmark.tiny(tmp_path)
    text = (tmp_path / "genome.fa").read_text()
    (tmp_path / "moved.fa").write_text(text.replace(">1\n", ">1\n" + "N" * 7).replace(">2\n", ">2\n" + "N" * 7))
    moved = GenomicBenchmark(**{**vars(task), "fasta": str(tmp_path / "moved.fa"), "offset": 7})
    assert [e.sequence for e in moved.load().splits["train"]] == [e.sequence for e in task.load().splits["train"]]


def archive_of(folder, classes=("negative", "positive")):
    with zipfile.ZipFile(folder / "dummy_mouse_enhancers_ensembl_v0.zip", "w") as archive:
        for split, count in (("train", 4), ("test", 2)):
            for name in classes:
                for i in range(count):
                    archive.writestr(f"dummy_mouse_enhancers_ensembl/{split}/{name}/{i}.txt", "acgt" * (i + 1))


def test_archive_is_read_offline_once_it_is_there(tmp_path):
    folder = tmp_path / "genomic_benchmarks"
    folder.mkdir()
    archive_of(folder)
    task = GenomicBenchmark(task="dummy_mouse_enhancers_ensembl", providers=("archive",), cache=str(tmp_path))
    data = task.load()
    assert [e.target for e in data.splits["test"]] == [0, 0, 1, 1]
    assert data.splits["train"][1].sequence == "ACGTACGT"
    assert any("rows unlike the published: train negative 4 of 484" in note for note in data.notes)


def test_archive_with_other_classes_is_refused(tmp_path):
    folder = tmp_path / "genomic_benchmarks"
    folder.mkdir()
    archive_of(folder, ("negative", "maybe"))
    with pytest.raises(ValueError, match="holds the classes"):
        GenomicBenchmark(task="dummy_mouse_enhancers_ensembl", providers=("archive",), cache=str(tmp_path)).load()


def test_hub_labels_are_mapped_by_name(tmp_path, monkeypatch):
    def rows(repo, split):
        count = {"train": 484, "test": 121}[split]
        return [{"seq": "gg", "label": 0}] * count + [{"seq": "aa", "label": 1}] * count, ["positive", "negative"]

    monkeypatch.setattr(genomic_benchmarks, "hub_rows", rows)
    task = GenomicBenchmark(task="dummy_mouse_enhancers_ensembl", providers=("hub",), cache=str(tmp_path))
    first = task.load().splits["train"][0]
    assert (first.sequence, task.load().target.names[first.target]) == ("GG", "positive")


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no task 'cohn'; there are: demo_coding"):
        GenomicBenchmark(task="cohn")
    with pytest.raises(ValueError, match="provider is one of intervals, archive, hub; got drive"):
        GenomicBenchmark(task="human_enhancers_cohn", providers=("drive",))
    with pytest.raises(FileNotFoundError, match=r"No provider can give .*intervals: not given .*data.intervals=FOLDER"):
        GenomicBenchmark(task="human_enhancers_cohn", providers=("intervals",), cache=str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match="No provider"):
        GenomicBenchmark(
            task="human_enhancers_cohn",
            intervals=str(tmp_path),
            fasta="x",
            providers=("intervals",),
            cache=str(tmp_path),
        ).load()


def test_there_are_nine_tasks_with_their_published_sizes():
    assert len(TASKS) == 9
    assert sum(sum(f.train) + sum(f.test) for f in TASKS.values()) == 890_705
