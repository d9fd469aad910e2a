"""Which species a stretch of DNA is from: one FASTA a species in a folder (HyenaDNA, section 4.4)."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from genossm.data.base import SPLITS
from genossm.data.examples import Example, Labelled, LabelledData, Target
from genossm.data.rows import FASTA_ENDINGS, ending_of
from genossm.data.windows import split_genome
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval, lengths


@dataclass(frozen=True, kw_only=True)
class Species(LabelledData):
    """Random stretches of the genomes in a folder; the class is the name of the file.

    The splits of a genome share no base: whole contigs are held out where there are enough, else the ends of each.

    Raises:
        ValueError: a number is below 1, or the shares leave nothing to train on.
    """

    path: str | None
    """Folder with a FASTA file (plain, gzip or BGZF) for each species."""
    length: int = 1024
    """Bases of a stretch."""
    rows: int = 1000
    """Training stretches a species; val and test have their shares of it."""
    val: float = 0.1
    """Share of each genome, and of `rows`, for validation."""
    test: float = 0.1
    """Share for the test."""
    max_n: float = 0.1
    """Largest share of N in a stretch."""
    seed: int = 0
    """What stretches are drawn from."""
    cache: str | None = None
    """Folder for encoded genomes; None is beside each FASTA."""

    def __post_init__(self) -> None:
        if min(self.length, self.rows) < 1:
            raise ValueError(f"data.length and data.rows must be at least 1; got {self.length} and {self.rows}.")
        if min(self.val, self.test) <= 0 or self.val + self.test >= 1 or not 0 <= self.max_n < 1:
            raise ValueError(
                "data.val and data.test are shares above 0 that sum to less than 1, data.max_n is in [0, 1); got"
                f" {self.val}, {self.test} and {self.max_n}."
            )

    def load(self) -> Labelled:
        """Draw the stretches."""
        if self.path is None:
            raise ValueError("Give the genomes with data.path: a folder with a FASTA file for each species.")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
        files = {p.name.split(".")[0]: p for p in sorted(folder.iterdir()) if ending_of(p) in FASTA_ENDINGS}
        if len(files) < 2:
            raise ValueError(f"{folder} holds {len(files)} FASTA file; classes need at least two, one a species.")
        names = tuple(sorted(files))
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for number, name in enumerate(names):
            genome = Genome(files[name], self.cache)
            rng = np.random.default_rng([self.seed, number])
            parts = split_genome(genome, "auto", self.val, self.test)
            for split, share in (("train", 1.0), ("val", self.val), ("test", self.test)):
                count = max(1, round(share * self.rows))
                splits[split] += self._drawn(genome, parts[split], count, rng, name, number)
        kind = "binary" if len(names) == 2 else "multiclass"
        return Labelled(target=Target(kind=kind, names=names), splits=splits, title=folder.name)

    def _drawn(
        self, genome: Genome, parts: list[Interval], count: int, rng: np.random.Generator, name: str, number: int
    ) -> list[Example]:
        room: npt.NDArray[np.int64] = np.maximum(lengths(parts) - self.length + 1, 0)
        if not room.sum():
            raise ValueError(f"No part of {name} is as long as {self.length} bp; lower data.length.")
        found: list[Example] = []
        for _ in range(20 * count):
            which = int(rng.choice(len(parts), p=room / room.sum()))
            start = parts[which].start + int(rng.integers(room[which]))
            place = Interval(parts[which].chrom, start, start + self.length, "-" if rng.random() < 0.5 else "+")
            codes = genome.fetch(place)
            if np.count_nonzero((codes & 0x7F) == alphabet.N) <= self.max_n * self.length:
                # Contigs of two species may have one name.
                named = Interval(f"{name}:{place.chrom}", place.start, place.end, place.strand)
                found.append(Example(alphabet.to_text(codes), number, named, name))
            if len(found) == count:
                return found
        raise ValueError(f"{name} has too few stretches of {self.length} bp with at most {self.max_n:.0%} N.")

    @classmethod
    def tiny(cls, path: Path) -> "Species":
        """Write three genomes of other composition."""
        rng = random.Random(0)
        path.mkdir(parents=True, exist_ok=True)
        for name, letters in (("fly", "AATTC"), ("mouse", "GGCCA"), ("yeast", "ACACG")):
            (path / f"{name}.fa").write_text(f">chr1\n{''.join(rng.choices(letters, k=3000))}\n")
        return cls(path=str(path), length=50, rows=20, cache=str(path / "cache"))
