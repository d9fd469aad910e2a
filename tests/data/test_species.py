import pytest

from genossm.data.species import Species


def test_stretches_are_of_their_genomes_and_classes_are_sorted(tmp_path):
    data = Species.tiny(tmp_path).load()
    assert data.target.names == ("fly", "mouse", "yeast")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 60, "val": 6, "test": 6}
    text = (tmp_path / "fly.fa").read_text().split("\n")[1]
    for example in data.splits["test"][:2]:
        cut = text[example.interval.start : example.interval.end]
        turned = cut[::-1].translate(str.maketrans("ACGT", "TGCA"))
        assert example.sequence == (turned if example.interval.strand == "-" else cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5000}, "is as long as 5000 bp"),
        ({"rows": 0}, "must be at least 1"),
        ({"test": 0.95}, "sum to less than 1"),
    ],
)
def test_mistakes_are_named(options, message, tmp_path):
    tiny = Species.tiny(tmp_path)
    with pytest.raises(ValueError, match=message):
        Species(**{"path": tiny.path, "length": 50, "cache": tiny.cache, **options}).load()


def test_one_genome_is_no_choice(tmp_path):
    (tmp_path / "fly.fa").write_text(">a\nACGT\n")
    with pytest.raises(ValueError, match="at least two, one a species"):
        Species(path=str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match="no folder"):
        Species(path=str(tmp_path / "none")).load()
