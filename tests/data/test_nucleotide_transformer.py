"""The Nucleotide Transformer's tasks from local files; the hub only where there is a network."""

import pytest

from genossm.data.nucleotide_transformer import ORIGINAL, REVISED, NucleotideTransformerTask, place_of
from genossm.dna.interval import Interval


def test_fasta_folder_of_the_original_form(tmp_path):
    data = NucleotideTransformerTask.tiny(tmp_path).load()
    assert data.target.names == ("0", "1", "2")
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 36, "val": 0, "test": 12}
    assert data.splits["train"][4].target == 1
    assert data.splits["test"][0].interval == Interval("chr1", 40000, 40040)


def test_table_with_a_task_column(tmp_path):
    path = tmp_path / "sample.tsv"
    path.write_text(
        "sequence\tname\tlabel\ttask\nACG\tchr1:5-8|1\t1\tH3K4me3\nAAG\tchr2:1-4|0\t0\tH3K4me3\nTTT\tx\t0\tH2AFZ\n"
    )
    data = NucleotideTransformerTask(task="H3K4me3", path=str(path)).load()
    assert [(e.sequence, e.target, e.interval) for e in data.splits["train"]] == [
        ("ACG", 1, Interval("chr1", 5, 8)),
        ("AAG", 0, Interval("chr2", 1, 4)),
    ]
    with pytest.raises(ValueError, match="has no row of task 'H3K9ac'; it has: H2AFZ, H3K4me3"):
        NucleotideTransformerTask(task="H3K9ac", path=str(path)).load()


def test_names_and_aliases():
    assert len(ORIGINAL) == len(REVISED) == 18
    assert NucleotideTransformerTask(task="promoter_non_tata", revised=False).name == "promoter_no_tata"
    with pytest.raises(ValueError, match="no revised task 'H4ac'; there are: H2AFZ"):
        NucleotideTransformerTask(task="H4ac")
    assert place_of("chr1:5-8|1") == Interval("chr1", 5, 8)
    assert place_of("gene 7") is None


def test_offline_says_what_can_be_done(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Without a network: give data\.path"):
        NucleotideTransformerTask(task="H3", revised=False, cache=str(tmp_path)).load()
