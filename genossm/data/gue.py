"""GUE, the Genome Understanding Evaluation (Zhou et al. 2023): 28 tasks in CSV files with train, dev and test."""

import random
from dataclasses import dataclass
from pathlib import Path

from genossm.data import rows
from genossm.data.examples import Example, Labelled, LabelledData, Target
from genossm.dna.interval import SPLIT_NAMES


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was published of a task: its folder, number of classes and length in bp."""

    folder: str
    classes: int
    length: int


_MARKS = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
TASKS = {
    **{mark: Facts(folder=f"EMP/{mark}", classes=2, length=500) for mark in _MARKS},
    **{f"tf_{i}": Facts(folder=f"tf/{i}", classes=2, length=101) for i in range(5)},
    **{f"mouse_{i}": Facts(folder=f"mouse/{i}", classes=2, length=101) for i in range(5)},
    **{f"prom_300_{k}": Facts(folder=f"prom/prom_300_{k}", classes=2, length=300) for k in ("all", "notata", "tata")},
    **{f"prom_core_{k}": Facts(folder=f"prom/prom_core_{k}", classes=2, length=70) for k in ("all", "notata", "tata")},
    "splice_reconstructed": Facts(folder="splice/reconstructed", classes=3, length=400),
    "virus_covid": Facts(folder="virus/covid", classes=9, length=999),
}
"""The tasks; their authors report the Matthews correlation, and F1 for virus_covid."""


@dataclass(frozen=True, kw_only=True)
class GUETask(LabelledData):
    """One task of GUE, from the unpacked files of its authors.

    Raises:
        ValueError: there is no such task.
    """

    task: str
    """Name of the task."""
    path: str | None
    """Folder of GUE, or of the task itself, which holds train.csv, dev.csv and test.csv."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"GUE has no task {self.task!r}; there are: {', '.join(TASKS)}.")

    def load(self) -> Labelled:
        """Read, check and return the task."""
        facts = TASKS[self.task]
        if self.path is None:
            raise ValueError("Give the folder of GUE with data.path=FOLDER; its authors' repository links the files.")
        root = Path(self.path).expanduser()
        tried = [root / facts.folder, root / "GUE" / facts.folder, root / Path(facts.folder).name, root]
        folder = next((place for place in tried if (place / "train.csv").is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"No train.csv of {self.task} in {root}; looked in {', '.join(map(str, tried))}.")
        columns = rows.read_splits(folder)
        sequences, labels = rows.find(columns, "sequence"), rows.find(columns, "label")
        if sequences is None or labels is None:
            raise ValueError(f"{folder} needs the columns sequence and label; it has {', '.join(columns)}.")
        rows.refuse_missing(labels, "label", str(folder))
        names = tuple(map(str, range(facts.classes)))
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        for row, (sequence, label, split) in enumerate(zip(sequences, labels, columns["split"], strict=True)):
            if label not in names:
                raise ValueError(f"{folder}, row {row}: label {label!r} is none of {', '.join(names)}.")
            splits[SPLIT_NAMES[split]].append(Example(sequence, int(label)))
        kind = "binary" if facts.classes == 2 else "multiclass"
        return Labelled(target=Target(kind=kind, names=names), splits=splits, title=f"GUE {self.task}")

    @classmethod
    def tiny(cls, path: Path) -> "GUETask":
        """Write train.csv, dev.csv and test.csv of a three-class task."""
        rng = random.Random(0)
        folder = path / TASKS["splice_reconstructed"].folder
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 36), ("dev", 9), ("test", 9)):
            lines = [
                f"{''.join(rng.choices(('AATTC', 'GGCCA', 'ACACG')[i % 3], k=40))},{i % 3}\n" for i in range(count)
            ]
            (folder / f"{split}.csv").write_text("sequence,label\n" + "".join(lines))
        return cls(task="splice_reconstructed", path=str(path))
