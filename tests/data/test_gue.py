import pytest

from genossm.data.gue import TASKS, GUETask


def test_there_are_28_tasks_each_in_its_folder(tmp_path):
    assert len(TASKS) == 28
    assert len({facts.folder for facts in TASKS.values()}) == 28
    tiny = GUETask.tiny(tmp_path)
    by_root = tiny.load()
    by_folder = GUETask(task=tiny.task, path=str(tmp_path / "splice" / "reconstructed")).load()
    assert {split: len(rows) for split, rows in by_root.splits.items()} == {"train": 36, "val": 9, "test": 9}
    assert by_root.splits == by_folder.splits


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("prom", None, "GUE has no task 'prom'; there are: H3, "),
        ("H3", None, "No train.csv of H3 in"),
        ("H3", "sequence,label\nACGT,2\n", "row 0: label '2' is none of 0, 1"),
        ("H3", "sequence,label\nACGT,\n", "no label"),
        ("H3", "name,label\nACGT,1\n", "needs the columns sequence and label"),
    ],
)
def test_mistakes_are_named(task, text, message, tmp_path):
    if text is not None:
        for split in ("train", "test"):
            (tmp_path / f"{split}.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GUETask(task=task, path=str(tmp_path)).load()


def test_a_folder_is_asked_for():
    with pytest.raises(ValueError, match=r"data\.path=FOLDER"):
        GUETask(task="H3", path=None).load()
