"""GenomicBenchmarks (Grešová et al. 2023): nine tasks from the hub, the published archive, or intervals and a FASTA."""

import csv
import gzip
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from genossm.data.examples import Example, Labelled, LabelledData, Target
from genossm.data.fetch import download, hub_rows, load_table, save_table, unpack
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval
from genossm.dna.liftover import Chain, Lift, Offset
from genossm.files import cache_folder, open_text

logger = logging.getLogger(__name__)

PROVIDERS = ("intervals", "archive", "hub")
ARCHIVE = "https://zenodo.org/records/16605299/files/{task}_v0.zip?download=1"
HUB = "katarinagresova/Genomic_Benchmarks_{task}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was published of a task: classes in their order, rows of each in train and test, longest sequence in bp."""

    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    longest: int


_SIGN = ("negative", "positive")
TASKS = {
    "demo_coding_vs_intergenomic_seqs": Facts(
        classes=("coding_seqs", "intergenomic_seqs"), train=(37_500, 37_500), test=(12_500, 12_500), longest=200
    ),
    "demo_human_or_worm": Facts(classes=("human", "worm"), train=(37_500, 37_500), test=(12_500, 12_500), longest=200),
    "drosophila_enhancers_stark": Facts(classes=_SIGN, train=(2_592, 2_592), test=(865, 865), longest=3_237),
    "dummy_mouse_enhancers_ensembl": Facts(classes=_SIGN, train=(484, 484), test=(121, 121), longest=4_776),
    "human_enhancers_cohn": Facts(classes=_SIGN, train=(10_422, 10_421), test=(3_474, 3_474), longest=500),
    "human_enhancers_ensembl": Facts(classes=_SIGN, train=(61_936, 61_936), test=(15_485, 15_485), longest=573),
    "human_ensembl_regulatory": Facts(
        classes=("enhancer", "ocr", "promoter"),
        train=(85_512, 69_902, 75_934),
        test=(21_378, 17_476, 18_859),
        longest=802,
    ),
    "human_nontata_promoters": Facts(classes=_SIGN, train=(12_355, 14_742), test=(4_119, 4_915), longest=251),
    "human_ocr_ensembl": Facts(classes=_SIGN, train=(69_902, 69_902), test=(17_476, 17_476), longest=593),
}
"""The nine tasks; sizes and lengths are counted on the published files."""


@dataclass(frozen=True, kw_only=True)
class GenomicBenchmark(LabelledData):
    """One task of GenomicBenchmarks.

    The first provider that can give the task does; what it gave is kept as one Parquet file in the cache and opened
    from there ever after.
    """

    task: str
    """One of `TASKS`."""
    providers: Sequence[str] = PROVIDERS
    """Some of "intervals" (published coordinates and a FASTA of yours), "archive" (the published one, over https) and
    "hub" (Parquet, needs the datasets library and a network), tried in this order."""
    intervals: str | None = None
    """Folder of the published interval files: TASK/{train,test}/CLASS.csv.gz."""
    fasta: str | Sequence[str] | None = None
    """Genome or genomes that the intervals are cut from."""
    chain: str | None = None
    """Chain file from the published assembly to that of the FASTA."""
    offset: int = 0
    """Bases added to every published position, where the FASTA begins elsewhere."""
    offset_contig: str | None = None
    """Contig that the offset applies to; rows on others have no place then. None applies it to all."""
    sha256: str | None = None
    """SHA-256 that the archive must have; None holds it to that of the first download."""
    cache: str | None = None
    """Folder for what is fetched; None is genossm's own."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"GenomicBenchmarks has no task {self.task!r}; there are: {', '.join(TASKS)}.")
        unknown = [name for name in self.providers if name not in PROVIDERS]
        if unknown or not self.providers:
            raise ValueError(f"A provider is one of {', '.join(PROVIDERS)}; got {', '.join(unknown) or 'none'}.")
        if self.chain is not None and self.offset:
            raise ValueError("Give a chain or an offset, not both.")

    def load(self) -> Labelled:
        """Return the task from the cache, else from the first provider that can give it."""
        kept = {name: self._table(name) for name in self.providers if name != "intervals" or self.intervals}
        for path in kept.values():
            if path.exists():
                splits, target, notes = load_table(path)
                return Labelled(target=target, splits=splits, title=self.task, notes=notes)
        readers: dict[str, Callable[[], tuple[dict[str, list[Example]], list[str]]]] = {
            "intervals": self._from_intervals,
            "archive": self._from_archive,
            "hub": self._from_hub,
        }
        refusals: list[str] = []
        for name in self.providers:
            if name == "intervals" and self.intervals is None:
                refusals.append("intervals: not given (data.intervals)")
                continue
            try:
                splits, notes = readers[name]()
            except (ConnectionError, FileNotFoundError) as error:
                logger.info("provider %s: %s", name, error)
                refusals.append(f"{name}: {error}")
                continue
            notes = [f"from provider {name}", *notes, *self._compare(splits)]
            target = self._target()
            data = Labelled(target=target, splits=splits, title=self.task, notes=notes)
            save_table(kept[name], splits, target, notes)
            return data
        raise FileNotFoundError(
            f"No provider can give {self.task}. {'; '.join(refusals)}. Without a network, data.providers=[intervals]"
            " cuts it from your genome: data.intervals=FOLDER of the published coordinate files, data.fasta=FASTA."
        )

    def _target(self) -> Target:
        classes = TASKS[self.task].classes
        return Target(kind="binary" if len(classes) == 2 else "multiclass", names=classes)

    def _table(self, provider: str) -> Path:
        folder = self._folder()
        if provider != "intervals":
            return folder / f"{self.task}.{provider}.parquet"
        fastas = [self.fasta] if isinstance(self.fasta, str) else list(self.fasta or ())
        parts = [str(self.intervals), str(self.offset), str(self.offset_contig)]
        for name in [*fastas, *([self.chain] if self.chain else [])]:
            path = Path(name)
            about = path.stat() if path.exists() else None
            parts += [str(path.resolve()), f"{about.st_size} {about.st_mtime_ns}" if about else ""]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return folder / f"{self.task}.intervals-{key}.parquet"

    def _folder(self) -> Path:
        return (Path(self.cache).expanduser() if self.cache else cache_folder()) / "genomic_benchmarks"

    def _compare(self, splits: dict[str, list[Example]]) -> list[str]:
        """Return a note where rows are fewer than published."""
        facts = TASKS[self.task]
        published = {"train": facts.train, "test": facts.test}
        short = [
            f"{split} {facts.classes[index]} {found:,} of {count:,}"
            for split, counts in published.items()
            for index, count in enumerate(counts)
            if (found := sum(e.target == index for e in splits[split])) != count
        ]
        return ["rows unlike the published: " + ", ".join(short)] if short else []

    def _from_intervals(self) -> tuple[dict[str, list[Example]], list[str]]:
        if self.fasta is None:
            raise ValueError("Intervals are cut from a genome: give it with data.fasta.")
        genome = Genome(self.fasta)
        lift: Lift | None = Chain(self.chain) if self.chain else None
        if self.offset or self.offset_contig:
            lift = Offset(by=self.offset, chrom=self.offset_contig)
        versions = {name.partition(".")[0]: name for name in genome.contigs if "." in name}
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        missing: Counter[str] = Counter()
        unplaced = 0
        for split, name, row, published in read_intervals(self._intervals_folder(), TASKS[self.task].classes):
            placed = lift(published) if lift else published
            if placed is None:
                unplaced += 1
                continue
            contig = placed.chrom if genome.size(placed.chrom) is not None else versions.get(placed.chrom)
            size = genome.size(contig) if contig is not None else None
            if contig is None or size is None:
                missing[placed.chrom] += 1
                continue
            if placed.end > size:
                unplaced += 1
                continue
            cut = alphabet.to_text(genome.fetch(Interval(contig, placed.start, placed.end, placed.strand))).upper()
            # What is kept is the published place, which leaks are looked for with.
            splits[split].append(Example(cut, TASKS[self.task].classes.index(name), published, row))
        if not splits["train"]:
            raise ValueError(f"No interval of {self.task} lies in {self.fasta}; are they of the same species?")
        notes: list[str] = []
        if missing:
            most = ", ".join(f"{contig} {count:,}" for contig, count in missing.most_common(5))
            notes.append(f"{sum(missing.values()):,} rows on {len(missing)} contigs that the FASTA lacks ({most}, …)")
        if unplaced:
            notes.append(f"{unplaced:,} rows without a place in the FASTA's assembly")
        return splits, notes

    def _intervals_folder(self) -> Path:
        root = Path(str(self.intervals)).expanduser()
        folder = root if (root / "train").is_dir() else root / self.task
        if not (folder / "train").is_dir():
            raise FileNotFoundError(
                f"{root} has no {self.task}/train; give the folder of the published interval files."
            )
        return folder

    def _from_archive(self) -> tuple[dict[str, list[Example]], list[str]]:
        folder = self._folder()
        archive = download(ARCHIVE.format(task=self.task), folder / f"{self.task}_v0.zip", self.sha256)
        root = unpack(archive, folder / f"{self.task}_v0")
        inner = root / self.task if (root / self.task).is_dir() else root
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        for split in ("train", "test"):
            self._check_classes(inner / split)
            for index, name in enumerate(TASKS[self.task].classes):
                paths = sorted((inner / split / name).glob("*.txt"), key=lambda p: (len(p.stem), p.stem))
                splits[split] += [Example(p.read_text().strip().upper(), index, None, p.stem) for p in paths]
        return splits, []

    def _check_classes(self, folder: Path) -> None:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if found != sorted(TASKS[self.task].classes):
            raise ValueError(f"{folder} holds the classes {found} instead of {sorted(TASKS[self.task].classes)}.")

    def _from_hub(self) -> tuple[dict[str, list[Example]], list[str]]:
        repo = HUB.format(task=self.task)
        classes = TASKS[self.task].classes
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        notes: list[str] = []
        for split, wanted in (("train", TASKS[self.task].train), ("test", TASKS[self.task].test)):
            rows, names = hub_rows(repo, split)
            if names is None:
                names = list(classes)
                notes.append(f"the hub's {split} labels have no names; taken in the order of the names")
            if sorted(names) != sorted(classes):
                raise ValueError(f"{repo} has the classes {names} instead of {list(classes)}.")
            index = [classes.index(name) for name in names]
            splits[split] = [Example(row["seq"].upper(), index[row["label"]]) for row in rows]
            counts = tuple(sum(e.target == i for e in splits[split]) for i in range(len(classes)))
            if counts != wanted:
                raise ValueError(f"{repo} has {counts} {split} rows of {', '.join(classes)} instead of {wanted}.")
        return splits, notes

    @classmethod
    def tiny(cls, path: Path) -> "GenomicBenchmark":
        """Write a FASTA and interval files of cohn's form: negatives are AT-rich stretches, positives GC-rich ones."""
        rng = random.Random(0)
        letters = ["".join(rng.choices("AATTC" if i % 2 == 0 else "GGCCA", k=50)) for i in range(80)]
        path.mkdir(parents=True, exist_ok=True)
        (path / "genome.fa").write_text(">1\n" + "".join(letters[:40]) + "\n>2\n" + "".join(letters[40:]) + "\n")
        for index in range(80):
            split = "test" if index % 40 >= 30 else "train"
            file = path / "human_enhancers_cohn" / split / f"{_SIGN[index % 2]}.csv.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            old = gzip.decompress(file.read_bytes()).decode() if file.exists() else "id,region,start,end,strand\n"
            start = 50 * (index % 40)
            row = f"{split}_{index},chr{1 + index // 40},{start},{start + 50},{'+-'[index % 3 == 0]}\n"
            file.write_bytes(gzip.compress((old + row).encode()))
        return cls(
            task="human_enhancers_cohn",
            providers=("intervals",),
            intervals=str(path),
            fasta=str(path / "genome.fa"),
            cache=str(path / "cache"),
        )


def read_intervals(folder: Path, classes: Sequence[str]) -> list[tuple[str, str, str, Interval]]:
    """Read published interval files: (split, class, id, interval) of each row, 0-based half-open.

    Raises:
        FileNotFoundError: the file of a class is missing.
        ValueError: a row is no interval; the message names file and row.
    """
    rows: list[tuple[str, str, str, Interval]] = []
    for split in ("train", "test"):
        for name in classes:
            paths = [folder / split / f"{name}.csv{ending}" for ending in (".gz", "")]
            path = next((p for p in paths if p.is_file()), paths[0])
            with open_text(path) as handle:
                for number, row in enumerate(csv.DictReader(handle)):
                    rows.append((split, name, row["id"], _interval(row, f"{path}, row {number}")))
    return rows


def _interval(row: dict[str, str], where: str) -> Interval:
    try:
        # An empty strand is forward, as the published code takes it.
        return Interval(row["region"], int(row["start"]), int(row["end"]), "-" if row["strand"] == "-" else "+")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
