"""`genossm score`: variants of a VCF to scores, as an annotated VCF or a table."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import genossm
from genossm import tables
from genossm.dna.alphabet import reverse_complement
from genossm.dna.genome import Genome
from genossm.dna.variant import Variant, Vcf, VcfRecord, letters, normalise, ref_problem, unscorable, windows
from genossm.effects import Effects, Site, open_classifier
from genossm.files import BgzfWriter
from genossm.inference import Opened, opened
from genossm.jobs import Job, Progress, Shard, identity_of_file, part_size
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier

logger = logging.getLogger(__name__)

FORMATS = (".vcf.gz", ".vcf", ".parquet", ".tsv")
POLICIES = ("error", "warn", "skip")
_PART_ALLELES, _LEAST_ALLELES = 256, 32
"""Alleles of a part at most, and, where there are enough, at least."""
SCORED = "scored"
STATUS = {
    SCORED: "it has scores",
    "symbolic": "<DEL> and the like, *: no sequence to score",
    "breakend": "a breakend",
    "iupac": "an ambiguous base in REF or ALT",
    "no_sequence": "REF or ALT is no DNA",
    "no_contig": "the genome has no such contig",
    "beyond_contig": "POS or REF lies beyond the contig's end",
    "ref_mismatch": "REF is not what the genome has there",
    "too_long": "the allele is longer than half the window",
    "same": "ALT is REF",
}
"""What an allele's `status` may be."""


@dataclass(frozen=True)
class Allele:
    """One ALT of one record: `variant` is left-normalised and None where it can't be scored."""

    record: int
    allele: int
    chrom: str
    position: int
    identifier: str
    ref: str
    alt: str
    status: str
    variant: Variant | None


@dataclass
class Scores:
    """What `score` gives back.

    Attributes:
        path: the output, or None where it was kept in memory.
        counts: alleles by status.
        seconds: how long it took.
        complete: False where other shards are still to finish.
    """

    path: Path | None
    counts: dict[str, int]
    seconds: float
    complete: bool = True
    table: pa.Table | None = field(default=None, repr=False)
    """The rows, where they were kept in memory."""

    def summary(self) -> dict[str, Any]:
        """Return the outcome for the command line."""
        return {"out": self.path, "complete": self.complete, "alleles": self.counts, "seconds": round(self.seconds, 2)}


def score(
    model: str | Path | Backbone | Classifier,
    *,
    vcf: Path,
    genome: Path,
    out: Path | None = None,
    methods: Sequence[str] | None = None,
    window: int | None = None,
    grid: int | None = None,
    strand: str = "both",
    ref_mismatch: str = "error",
    share: bool = True,
    batch_size: int | None = None,
    device: str | None = None,
    shard: str | None = None,
    overwrite: bool = False,
) -> Scores:
    """Score variants: genossm score --model M --vcf in.vcf.gz --genome G.fa --out scored.vcf.gz|.parquet|.tsv.

    Each allele is compared with the genome in a window around it. Symbolic alleles, breakends and alleles that don't
    fit are counted and left without a score.

    Args:
        model: a folder that holds a model (or a fine-tuned one, for method head), or the model itself.
        vcf: the variants; plain, gzip or BGZF.
        genome: FASTA of the assembly that the VCF is on; `20` and `chr20` are the same.
        out: .vcf.gz (BGZF), .vcf, .parquet or .tsv; in Python, None keeps the rows in memory.
        methods: of llr, l2, cosine and head, with commas; by default llr, or head for a fine-tuned model.
        window: bases around each variant; by default as many as the model takes, at most 8192.
        grid: windows begin at multiples of so many bases, so that variants close to each other have the same window and
            the model reads its reference once; by default a quarter of the window for causal models, which keeps each
            variant in the middle quarter. 1 centres each window on its variant, the default of all others.
        strand: both (the mean of the two) or forward.
        ref_mismatch: what to do where REF is not the genome's: error, warn (score against the genome) or skip.
        share: let a recurrent model compute what alleles share once.
        batch_size: sequences of a batch at most; by default as many as memory holds.
        device: cpu or cuda; by default the GPU if there is one.
        shard: i/n computes every n-th part; the shard that finishes last joins them.
        overwrite: replace an existing output.

    Returns:
        The output's path, or the rows in memory, and how many alleles were scored or why not.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: an input or option is wrong; the message says which.
    """
    began = time.monotonic()
    check_choice("strand", strand, ("both", "forward"))
    check_choice("ref_mismatch", ref_mismatch, POLICIES)
    ending = tables.check_format(out, FORMATS) if out is not None else ""
    classifier = open_classifier(model)
    backbone = classifier.backbone if classifier is not None else model
    assert not isinstance(backbone, Classifier)
    with opened(backbone, device) as ready:
        if classifier is not None:
            classifier.to(ready.device).eval()
        effects = Effects(ready, methods or (["head"] if classifier else ["llr"]), classifier, batch_size, share)
        size = check_window(window, ready)
        grid = choose_grid(grid, size, effects)
        store = Genome(genome)
        alleles = read_alleles(Vcf(vcf), store, size, ref_mismatch)
        run = Run(effects, store, alleles, size, strand, grid)
        provenance = {
            "genossm": genossm.__version__,
            **ready.provenance(),
            "methods": effects.methods,
            **{"window": size, "grid": grid, "strand": strand, "ref_mismatch": ref_mismatch},
            "coordinates": "1-based, as in VCF",
        }
        schema = tables.with_provenance(run.schema, provenance)
        counts = dict(Counter(allele.status for allele in alleles))
        if out is None:
            rows = run.table(schema)
            return Scores(None, counts, time.monotonic() - began, table=rows)
        inputs = {"vcf": identity_of_file(vcf), "genome": identity_of_file(genome), "share": share, "out": ending}
        job = Job(out, {"verb": "score", **provenance, **inputs}, len(run.parts), Shard.parse(shard), overwrite)

        def join(paths: Sequence[Path], path: Path) -> None:
            if ending in tables.TABLE_FORMATS:
                tables.join(paths, path, ending)
            else:
                annotate(Vcf(vcf), paths, path, ending == ".vcf.gz", provenance)

        with Progress("scoring", len(alleles), "alleles") as run.progress:
            complete = job.run(
                lambda part, path: tables.write_part(path, schema, iter([run.batch(part, schema)])), join
            )
    return Scores(Path(out), counts, time.monotonic() - began, complete)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed.

    Raises:
        ValueError: so it is.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")


def check_window(window: int | None, ready: Opened) -> int:
    """Return the bases of a window.

    Raises:
        ValueError: the model can't take so many.
    """
    limit = ready.context * ready.tokenizer.bases_per_token
    size = min(limit, 8192) if window is None else window
    if size < 2 or (ready.model.max_length is not None and size > limit):
        raise ValueError(f"window must be in 2..{limit} for this model; got {size}.")
    return size


def choose_grid(grid: int | None, window: int, effects: Effects) -> int:
    """Return the bases between the begins of two windows.

    A fine-tuned head was trained on windows around what it judges, and masked models read each site anew: for both the
    default centres.

    Raises:
        ValueError: a variant could come close to an end of its window.
    """
    most = max(1, window // 4)
    if grid is None:
        return most if effects.ready.model.causal and effects.classifier is None else 1
    if not 1 <= grid <= most:
        raise ValueError(f"grid must be in 1..{most}, a quarter of the window; got {grid}.")
    return grid


def read_alleles(vcf: Vcf, genome: Genome, window: int, policy: str) -> list[Allele]:
    """Read every ALT of every record, check it against the genome and left-normalise it.

    Args:
        vcf: the records.
        genome: what REF must agree with.
        window: bases of a window.
        policy: of `POLICIES`.

    Raises:
        ValueError: a REF disagrees and the policy is "error", or a line is no record.
        KeyError: the genome has none of the contigs.
    """
    alleles: list[Allele] = []
    missing: Counter[str] = Counter()
    for number, record in enumerate(vcf):
        try:
            contig = genome.resolve(record.chrom)
        except KeyError:
            contig = None
            missing[record.chrom] += 1
        for index, alt in enumerate(record.alts):
            status, variant = _judge(record, alt, contig, genome, window)
            if status == "ref_mismatch":
                if policy == "error":
                    raise ValueError(_mismatch(record, contig, genome, vcf.path))
                status = SCORED if policy == "warn" and variant is not None else status
            kept = variant if status == SCORED else None
            alleles.append(
                Allele(number, index, record.chrom, record.start + 1, record.id, record.ref, alt, status, kept)
            )
    if missing and all(allele.status == "no_contig" for allele in alleles):
        # The genome's own message lists what it has.
        genome.resolve(next(iter(missing)))
    skipped = Counter(allele.status for allele in alleles if allele.status != SCORED)
    if skipped:
        told = "; ".join(f"{count} {status} ({STATUS[status]})" for status, count in skipped.items())
        logger.warning("%s: alleles without a score: %s", vcf.path, told)
    if not alleles:
        raise ValueError(f"{vcf.path} holds no variant.")
    return alleles


def _judge(record: VcfRecord, alt: str, contig: str | None, genome: Genome, window: int) -> tuple[str, Variant | None]:
    """Return an allele's status and, where its sequence is known, the normalised variant."""
    reason = unscorable(record.ref, alt)
    if reason is not None:
        return reason, None
    if contig is None:
        return "no_contig", None
    variant = Variant(contig, record.start, record.ref.upper(), alt.upper())
    if variant.ref == variant.alt:
        return "same", None
    if max(len(variant.ref), len(variant.alt)) > window // 2:
        return "too_long", None
    codes = genome.codes(contig)
    problem = ref_problem(variant, codes)
    if problem == "beyond_contig":
        return problem, None
    if problem == "ref_mismatch":
        truth = Variant(contig, variant.start, letters(codes[variant.start : variant.end]), variant.alt)
        return problem, truth if truth.ref != truth.alt else None
    return SCORED, normalise(variant, codes)


def _mismatch(record: VcfRecord, contig: str | None, genome: Genome, path: Path) -> str:
    has = letters(genome.codes(contig or "")[record.start : record.start + len(record.ref)])
    return (
        f"{path}, line {record.line}: REF at {record.chrom}:{record.start + 1} is {record.ref[:20]}, but the genome has"
        f" {has[:20]} there. Is it the right assembly? ref_mismatch=skip leaves such alleles out, warn scores them"
        " against the genome."
    )


class Run:
    """The scoring of some alleles: its parts and how each is computed.

    Args:
        effects: the comparison.
        genome: where the windows come from.
        alleles: what to score.
        window: bases of a window.
        strand: "both" or "forward".
        grid: windows begin at multiples of it.
    """

    def __init__(
        self, effects: Effects, genome: Genome, alleles: Sequence[Allele], window: int, strand: str, grid: int = 1
    ):
        self.effects, self.genome, self.alleles = effects, genome, alleles
        self.window, self.grid = window, grid
        self.anchors = ("start", "end") if strand == "both" else ("start",)
        self.progress: Progress | None = None
        # A site is never cut, so that its alleles share their work.
        self.parts: list[range] = []
        first, most = 0, part_size(len(alleles), _PART_ALLELES, _LEAST_ALLELES)
        for number in range(1, len(alleles) + 1):
            end = number == len(alleles)
            if end or (number - first >= most and alleles[number].position != alleles[number - 1].position):
                self.parts.append(range(first, number))
                first = number
        text, whole = pa.string(), pa.int64()
        fields = [("chrom", text), ("pos", whole), ("id", text), ("ref", text), ("alt", text), ("record", whole)]
        fields += [("allele", whole), ("status", text), *((name, pa.float64()) for name in effects.columns)]
        self.schema = pa.schema(fields)

    def table(self, schema: pa.Schema) -> pa.Table:
        """Return all rows."""
        with Progress("scoring", len(self.alleles), "alleles") as self.progress:
            return pa.Table.from_batches([self.batch(part, schema) for part in range(len(self.parts))], schema)

    def batch(self, part: int, schema: pa.Schema) -> pa.RecordBatch:
        """Return the rows of a part."""
        chosen = [self.alleles[number] for number in self.parts[part]]
        sites: dict[tuple[str, int, str], list[int]] = {}
        for index, allele in enumerate(chosen):
            if allele.variant is not None:
                key = (allele.variant.chrom, allele.variant.start, allele.variant.ref)
                sites.setdefault(key, []).append(index)
        values = np.full((len(chosen), len(self.effects.columns)), np.nan)
        for group in sites.values():
            values[group] = 0
        for anchor in self.anchors:
            found = self.effects([self._site(chosen, group, anchor) for group in sites.values()])
            for group, rows in zip(sites.values(), found, strict=True):
                values[group] += rows / len(self.anchors)
        if self.progress is not None:
            self.progress.advance(len(chosen))
        columns: list[Any] = [
            [allele.chrom for allele in chosen],
            [allele.position for allele in chosen],
            [allele.identifier for allele in chosen],
            [allele.ref for allele in chosen],
            [allele.alt for allele in chosen],
            [allele.record for allele in chosen],
            [allele.allele for allele in chosen],
            [allele.status for allele in chosen],
        ]
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=False)]
        arrays += [pa.array(column, pa.float64(), from_pandas=True) for column in values.T]
        return pa.record_batch(arrays, schema=schema)

    def _site(self, chosen: Sequence[Allele], group: Sequence[int], anchor: str) -> Site:
        """Return the windows of one site along a strand: anchored at the end, they are read on the other one."""
        variants = [variant for index in group if (variant := chosen[index].variant) is not None]
        codes = self.genome.codes(variants[0].chrom)
        alts = [v.alt for v in variants]
        sequences, start, end = windows(variants[0], alts, codes, self.window, anchor, self.grid)
        longer = [0 if len(v.ref) == len(v.alt) else max(len(v.ref), len(v.alt)) for v in variants]
        if anchor == "start":
            return Site(sequences, start, longer)
        return Site([reverse_complement(s) for s in sequences], len(sequences[0]) - end, longer)


def annotate(vcf: Vcf, paths: Sequence[Path], out: Path, compressed: bool, provenance: dict[str, Any]) -> None:
    """Write the VCF with the scores of each allele in INFO; header, INFO and FORMAT stay as they are.

    Args:
        vcf: the input.
        paths: the parts' tables, in the order of the records.
        out: the file.
        compressed: write BGZF.
        provenance: for a header line.
    """
    rows = (row for block in tables.read_blocks(paths) for row in block.to_pylist())
    writer: Any = BgzfWriter(out) if compressed else out.open("wb")
    with writer:
        for line in _annotated(vcf, rows, provenance):
            writer.write(line.encode() + b"\n")


def _annotated(vcf: Vcf, rows: Iterator[dict[str, Any]], provenance: dict[str, Any]) -> Iterator[str]:
    row = next(rows, None)
    names = [name for name in row or {} if name not in Allele.__dataclass_fields__ and name not in ("pos", "id")]
    yield from vcf.header[:-1]
    plain = {key: ",".join(value) if isinstance(value, tuple) else value for key, value in provenance.items()}
    said = ",".join(f'{key}="{value}"' for key, value in plain.items())
    yield f"##genossm=<{said}>"
    for name in names:
        yield (
            f'##INFO=<ID=GENOSSM_{name.upper()},Number=A,Type=Float,Description="{name} of the allele by'
            f' {provenance["model"]}">'
        )
    yield '##INFO=<ID=GENOSSM_STATUS,Number=A,Type=String,Description="Why an allele has no score, where one has none">'
    yield vcf.header[-1]
    for number, record in enumerate(vcf):
        mine: list[dict[str, Any]] = []
        while row is not None and row["record"] == number:
            mine.append(row)
            row = next(rows, None)
        columns = [*record.columns, *["."] * (8 - len(record.columns))]
        added = [f"GENOSSM_{name.upper()}={','.join(_number(row[name]) for row in mine)}" for name in names if mine]
        if any(row["status"] != SCORED for row in mine):
            added.append("GENOSSM_STATUS=" + ",".join(row["status"] for row in mine))
        columns[7] = ";".join(([columns[7]] if columns[7] not in (".", "") else []) + added) or "."
        yield "\t".join(columns)


def _number(value: float | None) -> str:
    return "." if value is None else f"{value:.6g}"
