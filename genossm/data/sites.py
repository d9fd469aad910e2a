"""Small real tasks of the bundled human genome: splice sites and what a stretch is part of, in minutes on a laptop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genossm.data.datamodule import bundled
from genossm.data.examples import Example, Labelled, LabelledData, Target
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import SPLIT_NAMES, Interval, merge, read_bed

TASKS = {"splice_sites": ("acceptor", "decoy", "donor"), "regions": ("exon", "intergenic", "intron")}


@dataclass(frozen=True, kw_only=True)
class BundledTask(LabelledData):
    """A task made from the bundled 2^20 bp of human chr20 and the exons of its 48 genes.

    "splice_sites" asks whether the middle of a stretch, read along the gene, is a donor, an acceptor, or a decoy: a GT
    or AG of the same genes that is none. "regions" asks whether the middle lies in an exon, an intron or between genes.
    Splits are those of the shipped intervals, so no base of test is in train.

    Raises:
        ValueError: there is no such task, or the length is odd or too short.
    """

    task: str = "splice_sites"
    """One of `TASKS`."""
    length: int = 200
    """Bases of a stretch."""
    seed: int = 0
    """What decoys and stretches are drawn from."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"No bundled task is named {self.task!r}; there are: {', '.join(TASKS)}.")
        if self.length < 20 or self.length % 2:
            raise ValueError(f"length must be even and at least 20; got {self.length}.")

    def load(self) -> Labelled:
        """Cut the stretches."""
        genome = Genome(bundled("fa.gz"))
        exons = [(row.interval, row.fields) for row in read_bed(bundled("exons.bed.gz"))]
        splits = [(row.interval, SPLIT_NAMES[row.fields[0]]) for row in read_bed(bundled("intervals.bed"))]
        rng = np.random.default_rng(self.seed)
        found = self._splice(genome, exons, rng) if self.task == "splice_sites" else self._regions(exons, rng, genome)
        placed: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        names = TASKS[self.task]
        for label, interval in found:
            home = [split for block, split in splits if block.start <= interval.start and interval.end <= block.end]
            if home:
                text = alphabet.to_text(genome.fetch(interval))
                placed[home[0]].append(Example(text, names.index(label), interval))
        target = Target(kind="multiclass", names=names)
        return Labelled(target=target, splits=placed, title=f"bundled {self.task}")

    def _window(self, chrom: str, middle: int, strand: str) -> Interval | None:
        start = middle - self.length // 2
        return Interval(chrom, start, start + self.length, strand) if start >= 0 else None

    def _splice(
        self, genome: Genome, exons: Sequence[tuple[Interval, tuple[str, ...]]], rng: np.random.Generator
    ) -> list[tuple[str, Interval]]:
        sites: dict[tuple[str, int, str], str] = {}
        for exon, (_, left, strand, right) in exons:
            for there, edge, forward, reverse in (
                (left == "1", exon.start, "acceptor", "donor"),
                (right == "1", exon.end, "donor", "acceptor"),
            ):
                if there:
                    sites[exon.chrom, edge, strand] = forward if strand == "+" else reverse
        found = [
            (label, window)
            for (chrom, edge, strand), label in sorted(sites.items())
            if (window := self._window(chrom, edge, strand)) is not None
        ]
        genes = genes_of(exons)
        pools = [
            (gene.chrom, gene.start + int(offset) + (0 if (word == "GT") == (strand == "+") else 2), strand)
            for gene, strand in genes
            for word in ("GT", "AG")
            for offset in _places(alphabet.to_text(genome.fetch(gene)).upper(), word, strand)
        ]
        decoys = [place for place in pools if place not in sites]
        chosen = rng.permutation(len(decoys))[: len(found) // 2]
        windows = [self._window(*decoys[i]) for i in sorted(chosen.tolist())]
        return found + [("decoy", window) for window in windows if window is not None]

    def _regions(
        self, exons: Sequence[tuple[Interval, tuple[str, ...]]], rng: np.random.Generator, genome: Genome
    ) -> list[tuple[str, Interval]]:
        chrom, size = next(iter(genome.contigs.items()))
        kind = np.zeros(size, np.uint8)
        for gene, _ in genes_of(exons):
            kind[gene.start : gene.end] = 1
        for exon in merge(exon for exon, _ in exons):
            kind[exon.start : exon.end] = 2
        found: list[tuple[str, Interval]] = []
        for value, label in enumerate(("intergenic", "intron", "exon")):
            places = np.flatnonzero(kind == value)
            middles = rng.choice(places, size=min(1200, len(places)), replace=False)
            for middle in sorted(middles.tolist()):
                window = self._window(chrom, middle, "-" if rng.random() < 0.5 else "+")
                if window is not None:
                    found.append((label, window))
        return found

    @classmethod
    def tiny(cls, path: Path) -> "BundledTask":
        """Return the task itself: its data is shipped."""
        del path
        return cls(length=40)


def genes_of(exons: Sequence[tuple[Interval, tuple[str, ...]]]) -> list[tuple[Interval, str]]:
    """Return each gene's stretch, from its first exon to its last, and its strand."""
    spans: dict[tuple[str, str, str], tuple[int, int]] = {}
    for exon, (gene, _, strand, _) in exons:
        first, last = spans.get((exon.chrom, gene, strand), (exon.start, exon.end))
        spans[exon.chrom, gene, strand] = (min(first, exon.start), max(last, exon.end))
    return [(Interval(chrom, *span), strand) for (chrom, _, strand), span in spans.items()]


def _places(text: str, word: str, strand: str) -> list[int]:
    """Return where a word begins on the forward strand; on the other strand its complement is looked for."""
    wanted = word if strand == "+" else alphabet.reverse_complement_text(word)
    found: list[int] = []
    place = text.find(wanted)
    while place >= 0:
        found.append(place)
        place = text.find(wanted, place + 1)
    return found
