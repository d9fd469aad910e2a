"""The downstream tasks of the Nucleotide Transformer (Dalla-Torre et al. 2023, 2024): 18 original, 18 revised."""

import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

from genossm.data import rows
from genossm.data.examples import Example, Labelled, LabelledData, Target
from genossm.data.fetch import hub_rows, load_table, save_table
from genossm.dna.interval import SPLIT_NAMES, Interval
from genossm.files import cache_folder

logger = logging.getLogger(__name__)

_MARKS = ("H3", "H4", "H3K4me1", "H3K4me2", "H3K4me3", "H3K9ac", "H3K14ac", "H3K36me3", "H3K79me3", "H4ac")
_REVISED_MARKS = (
    "H2AFZ",
    "H3K27ac",
    "H3K27me3",
    "H3K36me3",
    "H3K4me1",
    "H3K4me2",
    "H3K4me3",
    "H3K9ac",
    "H3K9me3",
    "H4K20me1",
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was published of a task: number of classes, length in bp, and the metric of the original's tables."""

    classes: int
    length: int
    metric: str


ORIGINAL = {
    **{mark: Facts(classes=2, length=500, metric="mcc") for mark in _MARKS},
    "enhancers": Facts(classes=2, length=200, metric="mcc"),
    "enhancers_types": Facts(classes=3, length=200, metric="mcc"),
    "promoter_all": Facts(classes=2, length=300, metric="f1_binary"),
    "promoter_no_tata": Facts(classes=2, length=300, metric="f1_binary"),
    "promoter_tata": Facts(classes=2, length=300, metric="f1_binary"),
    "splice_sites_acceptors": Facts(classes=2, length=600, metric="f1_binary"),
    "splice_sites_donors": Facts(classes=2, length=600, metric="f1_binary"),
    "splice_sites_all": Facts(classes=3, length=400, metric="accuracy"),
}
REVISED = {
    **{mark: Facts(classes=2, length=1000, metric="mcc") for mark in _REVISED_MARKS},
    "enhancers": Facts(classes=2, length=400, metric="mcc"),
    "enhancers_types": Facts(classes=3, length=400, metric="mcc"),
    "promoter_all": Facts(classes=2, length=300, metric="mcc"),
    "promoter_no_tata": Facts(classes=2, length=300, metric="mcc"),
    "promoter_tata": Facts(classes=2, length=300, metric="mcc"),
    "splice_sites_acceptors": Facts(classes=2, length=600, metric="mcc"),
    "splice_sites_donors": Facts(classes=2, length=600, metric="mcc"),
    "splice_sites_all": Facts(classes=3, length=600, metric="mcc"),
}
ALIASES = {
    "enhancer": "enhancers",
    "enhancer_types": "enhancers_types",
    "promoter_non_tata": "promoter_no_tata",
    "splice_sites_acceptor": "splice_sites_acceptors",
    "splice_sites_donor": "splice_sites_donors",
}
"""Names that HyenaDNA's configuration uses."""
HUBS = {
    False: "InstaDeepAI/nucleotide_transformer_downstream_tasks",
    True: "InstaDeepAI/nucleotide_transformer_downstream_tasks_revised",
}


@dataclass(frozen=True, kw_only=True)
class NucleotideTransformerTask(LabelledData):
    """One downstream task, from local files or from the hub (which the revised rows may only be loaded from).

    Raises:
        ValueError: there is no such task.
    """

    task: str
    """Name of the task."""
    revised: bool = True
    """The revised tasks (2024), which their authors ask to use, or the original ones."""
    path: str | None = None
    """Folder with TASK/train.fna and TASK/test.fna, or a table with sequence, label, task (and split); None takes the
    hub."""
    cache: str | None = None
    """Folder for what is fetched; None is genossm's own."""

    def __post_init__(self) -> None:
        if self.name not in self._tasks():
            which = "revised" if self.revised else "original"
            other = f" The others are chosen by data.revised={str(not self.revised).lower()}."
            raise ValueError(f"There is no {which} task {self.task!r}; there are: {', '.join(self._tasks())}.{other}")

    @property
    def name(self) -> str:
        """The task's published name."""
        return ALIASES.get(self.task, self.task)

    @property
    def facts(self) -> Facts:
        """What was published of it."""
        return self._tasks()[self.name]

    def _tasks(self) -> dict[str, Facts]:
        return REVISED if self.revised else ORIGINAL

    def load(self) -> Labelled:
        """Read, check and return the task."""
        classes = self.facts.classes
        target = Target(kind="binary" if classes == 2 else "multiclass", names=tuple(map(str, range(classes))))
        if self.path is None:
            splits, notes = self._from_hub(target)
        else:
            splits, notes = self._from_files(Path(self.path).expanduser())
        return Labelled(target=target, splits=splits, title=self.name, notes=notes)

    def _from_files(self, path: Path) -> tuple[dict[str, list[Example]], list[str]]:
        if path.is_dir():
            folder = next((path / n for n in (self.name, self.task) if (path / n).is_dir()), path)
            columns = rows.read_splits(folder)
        else:
            columns = rows.read_columns(path)
            if "task" in columns:
                kept = [i for i, task in enumerate(columns["task"]) if task == self.name]
                if not kept:
                    there = ", ".join(sorted(set(columns["task"])))
                    raise ValueError(f"{path} has no row of task {self.name!r}; it has: {there}.")
                columns = {name: [cells[i] for i in kept] for name, cells in columns.items()}
        return self._examples(columns, str(path)), []

    def _examples(self, columns: rows.Columns, where: str) -> dict[str, list[Example]]:
        sequences, labels = rows.find(columns, "sequence"), rows.find(columns, "label")
        if sequences is None or labels is None:
            raise ValueError(f"{where} needs the columns sequence and label; it has {', '.join(columns)}.")
        names = rows.find(columns, "name") or [""] * len(sequences)
        given = rows.find(columns, "split") or ["train"] * len(sequences)
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        allowed = [str(i) for i in range(self.facts.classes)]
        for row, (sequence, label, name, split) in enumerate(zip(sequences, labels, names, given, strict=True)):
            if label not in allowed:
                raise ValueError(f"{where}, row {row}: label {label!r} is none of {', '.join(allowed)}.")
            splits[SPLIT_NAMES[split]].append(Example(sequence, int(label), place_of(name), name))
        return splits

    def _from_hub(self, target: Target) -> tuple[dict[str, list[Example]], list[str]]:
        root = Path(self.cache).expanduser() if self.cache else cache_folder()
        which = "revised" if self.revised else "original"
        kept = root / "nucleotide_transformer" / f"{self.name}.{which}.parquet"
        if kept.exists():
            splits, _, notes = load_table(kept)
            return splits, notes
        repo = HUBS[self.revised]
        columns: rows.Columns = {"sequence": [], "label": [], "name": [], "split": []}
        for split in ("train", "test"):
            try:
                found, _ = hub_rows(repo, split)
            except ConnectionError as error:
                raise FileNotFoundError(
                    f"{error}. Without a network: give data.path, a folder with {self.name}/train.fna and test.fna, or"
                    " a table with the columns sequence, label and task."
                ) from None
            for row in found:
                if row["task"] == self.name:
                    for key in ("sequence", "label", "name"):
                        columns[key].append(str(row[key]))
                    columns["split"].append(split)
        splits = self._examples(columns, repo)
        save_table(kept, splits, target, [f"from {repo}"])
        return splits, [f"from {repo}"]

    @classmethod
    def tiny(cls, path: Path) -> "NucleotideTransformerTask":
        """Write train.fna and test.fna of a three-class task in the original's form."""
        rng = random.Random(0)
        folder = path / "splice_sites_all"
        folder.mkdir(parents=True, exist_ok=True)
        for split, numbers in (("train", range(36)), ("test", range(1000, 1012))):
            with (folder / f"{split}.fna").open("w") as handle:
                for i in numbers:
                    sequence = "".join(rng.choices(("AATTC", "GGCCA", "ACACG")[i % 3], k=40))
                    handle.write(f">chr1:{40 * i}-{40 * i + 40}|{i % 3}\n{sequence}\n")
        return cls(task="splice_sites_all", revised=False, path=str(path))


def place_of(name: str) -> Interval | None:
    """Return the interval that a row's name gives as `chrom:start-end|label` (0-based half-open), or None."""
    found = re.match(r"(\w+):(\d+)-(\d+)(\||$)", name)
    if found is None or int(found[3]) <= int(found[2]):
        return None
    return Interval(found[1], int(found[2]), int(found[3]))
