"""Variants: VCF records, alleles on a contig, left-normalisation. Positions are 0-based here; VCF's are 1-based."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.files import open_text

_SEQUENCE = re.compile(r"[ACGTN]+", re.IGNORECASE)
_AMBIGUOUS = re.compile(rf"[ACGTN{alphabet.IUPAC_AMBIGUOUS}]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variant:
    """An exchange of `ref`, which begins at `start` (0-based) of a contig, for `alt`; either may be empty."""

    chrom: str
    start: int
    ref: str
    alt: str

    @property
    def end(self) -> int:
        """0-based position after the last base of `ref`."""
        return self.start + len(self.ref)

    def trimmed(self) -> "Variant":
        """Return the same exchange without the bases that both alleles begin or end with."""
        ref, alt, start = self.ref, self.alt, self.start
        while ref and alt and ref[-1] == alt[-1]:
            ref, alt = ref[:-1], alt[:-1]
        while ref and alt and ref[0] == alt[0]:
            ref, alt, start = ref[1:], alt[1:], start + 1
        return Variant(self.chrom, start, ref, alt)


@dataclass(frozen=True, slots=True)
class VcfRecord:
    """One line of a VCF: `start` is 0-based (POS - 1), `columns` are all as they stand, `line` counts from 1."""

    chrom: str
    start: int
    ref: str
    alts: tuple[str, ...]
    columns: tuple[str, ...]
    line: int

    @property
    def id(self) -> str:
        """The ID column."""
        return self.columns[2]


class Vcf:
    """A VCF file, plain, gzip or BGZF, with or without genotypes, read record by record.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no `#CHROM` line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header: list[str] = []
        with open_text(path) as lines:
            for line in lines:
                text = line.rstrip("\r\n")
                if text.startswith("#"):
                    self.header.append(text)
                elif text:
                    break
        if not self.header or not self.header[-1].startswith("#CHROM"):
            raise ValueError(
                f"{path} is no VCF: its header has no line that begins with #CHROM. Columns must be named by"
                " '#CHROM POS ID REF ALT QUAL FILTER INFO', separated by tabs."
            )
        if "\t" not in self.header[-1]:
            raise ValueError(f"{path}, line {len(self.header)}: the columns of a VCF are separated by tabs.")

    def __iter__(self) -> Iterator[VcfRecord]:
        """Yield the records in order.

        Raises:
            ValueError: a line is no record; the message names it.
        """
        with open_text(self.path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.startswith("#") or not line.strip():
                    continue
                columns = tuple(line.rstrip("\r\n").split("\t"))
                where = f"{self.path}, line {number}"
                if len(columns) == 1:
                    raise ValueError(f"{where}: the columns of a VCF are separated by tabs; got {line[:60]!r}.")
                if len(columns) < 5:
                    raise ValueError(f"{where}: a record needs at least CHROM, POS, ID, REF and ALT.")
                if not columns[1].isdigit():
                    raise ValueError(f"{where}: POS must be a whole number (1-based); got {columns[1]!r}.")
                alts = () if columns[4] in (".", "") else tuple(columns[4].split(","))
                yield VcfRecord(columns[0], int(columns[1]) - 1, columns[3], alts, columns, number)


def unscorable(ref: str, alt: str) -> str | None:
    """Return why an allele has no sequence of its own, or None where it has."""
    if alt.startswith("<") or alt in ("*", "."):
        return "symbolic"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return "breakend"
    for allele in (ref, alt):
        if not _SEQUENCE.fullmatch(allele):
            return "iupac" if _AMBIGUOUS.fullmatch(allele) else "no_sequence"
    return None


def normalise(variant: Variant, codes: Bytes) -> Variant:
    """Shift an insertion or deletion as far left as it goes and trim it, as VCF wants it (Tan et al. 2015).

    Args:
        variant: alleles as in a VCF, upper case.
        codes: stored bases of the contig.

    Returns:
        The same exchange: neither allele is empty, they end in different bases, and begin in different ones unless
        one of them is a single base.
    """
    start, ref, alt = variant.start, variant.ref, variant.alt
    while ref != alt:
        if ref and alt and ref[-1] == alt[-1]:
            ref, alt = ref[:-1], alt[:-1]
        elif not ref or not alt:
            if start == 0:
                # Nothing stands to the left: VCF anchors at the base that follows.
                anchor = letters(codes[len(ref) : len(ref) + 1])
                return Variant(variant.chrom, 0, ref + anchor, alt + anchor)
            start -= 1
            anchor = letters(codes[start : start + 1])
            ref, alt = anchor + ref, anchor + alt
        else:
            break
    while len(ref) > 1 and len(alt) > 1 and ref[0] == alt[0]:
        ref, alt, start = ref[1:], alt[1:], start + 1
    return Variant(variant.chrom, start, ref, alt)


def letters(codes: Bytes) -> str:
    """Return stored bases as upper-case letters."""
    return alphabet.to_text(codes & np.uint8(0x7F))


def ref_problem(variant: Variant, codes: Bytes) -> str | None:
    """Return how a variant fails to fit its contig: `beyond_contig` or `ref_mismatch`, or None where it fits."""
    if variant.start < 0 or variant.end > len(codes):
        return "beyond_contig"
    return None if letters(codes[variant.start : variant.end]) == variant.ref.upper() else "ref_mismatch"


def windows(
    variant: Variant, alts: Sequence[str], codes: Bytes, length: int, anchor: str, grid: int = 1
) -> tuple[list[Bytes], int, int]:
    """Cut windows around a site, one of the reference and one of each allele.

    Of the windows that begin at multiples of `grid` it is the one whose middle is nearest to the site's, so that close
    sites have the same one; at the ends of the contig it is shifted inwards. An allele that is longer or shorter than
    the reference gets fewer or more bases at the end that is not anchored, so that all windows are equally long as far
    as the contig reaches.

    Args:
        variant: the site and its reference allele; its own `alt` is not read.
        alts: the alleles.
        codes: stored bases of the contig.
        length: bases of a window.
        anchor: "start": all windows begin at the same base, "end": all end at the same base.
        grid: bases, 1 for windows that are centred exactly; at most a quarter of `length`.

    Returns:
        The windows, reference first, and the half-open range of the reference allele in the first.
    """
    first = ((variant.start + variant.end) // 2 - length // 2 + grid // 2) // grid * grid
    first = min(max(0, first), max(0, len(codes) - length))
    last = min(first + length, len(codes))
    left, right = codes[first : variant.start], codes[variant.end : last]
    made: list[Bytes] = [np.asarray(codes[first:last])]
    for alt in alts:
        middle = alphabet.from_text(alt)
        if anchor == "start":
            room = max(0, length - len(left) - len(middle))
            made.append(np.concatenate([left, middle, codes[variant.end : variant.end + room]])[:length])
        else:
            room = max(0, length - len(right) - len(middle))
            before = codes[max(0, variant.start - room) : variant.start]
            made.append(np.concatenate([before, middle, right])[-length:])
    return made, variant.start - first, variant.end - first
