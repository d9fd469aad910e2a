"""Labelled variants, as the Genomics Long-Range Benchmark has them: both alleles in their surroundings, and a class."""

import random
from dataclasses import dataclass
from pathlib import Path

from genossm.data import rows
from genossm.data.examples import Example, Labelled, LabelledData, Target, in_order
from genossm.dna.interval import SPLIT_NAMES, Interval

ALLELES = ("both", "ref", "alt")
REF, ALT = "ref_forward_sequence", "alt_forward_sequence"


@dataclass(frozen=True, kw_only=True)
class VariantEffect(LabelledData):
    """Causal eQTLs or pathogenic variants in the benchmark's columns.

    Columns: ref_forward_sequence, alt_forward_sequence, label, chromosome, position (1-based, as in VCF) and, where
    there are, tissue and distance_to_nearest_tss; the variant stands in the middle. An example is both alleles one
    after the other, so that a model can compare them, or one of them, which is what a model knows without comparing.

    Raises:
        ValueError: there is no such choice of alleles, or the length is below 1.
    """

    path: str | None
    """Folder with train.* and test.* (CSV, TSV or Parquet), or one table with a split column."""
    alleles: str = "both"
    """One of `ALLELES`."""
    length: int | None = None
    """Bases about the variant that are kept of each allele; None keeps what the file has."""
    tissue: str | None = None
    """Rows of one tissue alone."""

    def __post_init__(self) -> None:
        if self.alleles not in ALLELES:
            raise ValueError(f"data.alleles must be one of {', '.join(ALLELES)}; got {self.alleles!r}.")
        if self.length is not None and self.length < 1:
            raise ValueError(f"data.length must be at least 1; got {self.length}.")

    def load(self) -> Labelled:
        """Read, check and return the variants."""
        if self.path is None:
            raise ValueError("Give the variants with data.path: a folder with train.* and test.*, or one table.")
        path = Path(self.path).expanduser()
        columns = rows.read_splits(path) if path.is_dir() else rows.read_columns(path)
        missing = [name for name in (REF, ALT, "label", "chromosome", "position") if name not in columns]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}.")
        rows.refuse_missing(columns["label"], "label", str(path))
        names = in_order(set(columns["label"]))
        splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
        given = rows.find(columns, "split") or ["train"] * len(columns["label"])
        for row, split in enumerate(given):
            if self.tissue is not None and columns.get("tissue", [""] * len(given))[row] != self.tissue:
                continue
            if split.lower() not in SPLIT_NAMES:
                raise ValueError(f"{path}, row {row}: split {split!r} is none of {', '.join(SPLIT_NAMES)}.")
            splits[SPLIT_NAMES[split.lower()]].append(self._example(columns, row, names, f"{path}, row {row}"))
        if self.tissue is not None and not any(splits.values()):
            there = ", ".join(sorted(set(columns.get("tissue", ())))) or "no tissue column"
            raise ValueError(f"{path} has no row of tissue {self.tissue!r}; it has: {there}.")
        kind = "binary" if len(names) == 2 else "multiclass"
        return Labelled(target=Target(kind=kind, names=names), splits=splits, title=path.name)

    def _example(self, columns: rows.Columns, row: int, names: tuple[str, ...], where: str) -> Example:
        ref, alt = columns[REF][row], columns[ALT][row]
        if ref.upper() == alt.upper():
            raise ValueError(f"{where}: both alleles have the same sequence.")
        try:
            place = int(columns["position"][row]) - 1
        except ValueError:
            raise ValueError(f"{where}: position {columns['position'][row]!r} is no whole number.") from None
        ref, alt = self._cut(ref, where), self._cut(alt, where)
        start = max(0, place - len(ref) // 2)
        text = {"both": ref + alt, "ref": ref, "alt": alt}[self.alleles]
        interval = Interval(columns["chromosome"][row], start, start + len(ref))
        return Example(text, names.index(columns["label"][row]), interval, f"{columns['chromosome'][row]}:{place + 1}")

    def _cut(self, text: str, where: str) -> str:
        if self.length is None:
            return text
        if len(text) < self.length:
            raise ValueError(f"{where}: the sequence has {len(text)} bp, data.length={self.length} asks for more.")
        start = len(text) // 2 - self.length // 2
        return text[start : start + self.length]

    @classmethod
    def tiny(cls, path: Path) -> "VariantEffect":
        """Write train.csv and test.csv in which the class tells whether the variant makes a G."""
        rng = random.Random(0)
        path.mkdir(parents=True, exist_ok=True)
        for split, numbers in (("train", range(40)), ("test", range(1000, 1012))):
            lines = [f"{REF},{ALT},label,tissue,chromosome,position,distance_to_nearest_tss\n"]
            for i in numbers:
                left, right = ("".join(rng.choices("ACGT", k=20)) for _ in range(2))
                alleles = (f"{left}{base}{right}" for base in ("A", "CG"[i % 2]))
                lines.append(f"{','.join(alleles)},{i % 2},Liver,chr1,{100 * i + 50},{i}\n")
            (path / f"{split}.csv").write_text("".join(lines))
        return cls(path=str(path))
