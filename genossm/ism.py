"""`genossm ism`: every substitution of every base of a region, and what each changes for a model."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import genossm
from genossm import tables
from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.effects import Effects, open_classifier
from genossm.inference import opened
from genossm.jobs import Job, Progress, Shard
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.ops.backend import installed
from genossm.records import BedRecords, Records, TextRecords, open_records

FORMATS = (".parquet", ".tsv", ".bedgraph", ".bw")
_PART_POSITIONS = 256


@dataclass
class Mutagenesis:
    """What `ism` gives back.

    Attributes:
        path: the output, or None where it was kept in memory.
        seconds: how long it took.
        complete: False where other shards are still to finish.
    """

    path: Path | None
    seconds: float
    complete: bool = True
    _table: pa.Table | None = field(default=None, repr=False)

    @property
    def table(self) -> pa.Table:
        """The rows: region, position, exchanged base and its effects."""
        if self._table is None:
            if self.path is None or self.path.suffix != ".parquet":
                raise ValueError(f"{self.path} is no Parquet file.")
            import pyarrow.parquet as pq

            self._table = pq.read_table(self.path)
        return self._table

    def matrix(self, region: int = 0, column: str = "llr") -> Any:
        """Return the effects of a region as (4, L), bases in the order A, C, G, T; 0 at the reference base."""
        return tables.substitution_matrix(self.table, region, column)

    def summary(self) -> dict[str, Any]:
        """Return the outcome for the command line."""
        return {"out": self.path, "complete": self.complete, "seconds": round(self.seconds, 2)}


def ism(
    model: str | Path | Backbone | Classifier,
    sequences: Sequence[str] | None = None,
    *,
    fasta: str | Path | None = None,
    bed: str | Path | None = None,
    genome: str | Path | None = None,
    out: str | Path | None = None,
    methods: Sequence[str] | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    shard: str | None = None,
    overwrite: bool = False,
) -> Mutagenesis:
    """Mutate every base: genossm ism --model M --bed B --genome G.fa --out ism.parquet|.tsv|.bedgraph|.bw.

    Each of the 3 L substitutions is compared with the sequence as it is, on the strand that is given. Tracks hold, at
    each base, the mean of its three effects with the sign turned: high where the model wants the base as it is.

    Args:
        model: a folder that holds a model (or a fine-tuned one, for method head), or the model itself.
        sequences: texts of DNA, instead of a file.
        fasta: mutate the sequences of this FASTA.
        bed: mutate the intervals of this BED file, on `genome`.
        genome: FASTA that the BED lies on.
        out: .parquet, .tsv, .bedgraph or .bw; in Python, None keeps the rows in memory.
        methods: of llr, l2, cosine and head, with commas; by default llr, or head for a fine-tuned model.
        context: bases that the model sees around each interval of a BED, the interval included; by default itself.
        batch_size: sequences of a batch at most; by default as many as memory holds.
        device: cpu or cuda; by default the GPU if there is one.
        shard: i/n computes every n-th part; the shard that finishes last joins them.
        overwrite: replace an existing output.

    Returns:
        The output's path, or the rows in memory.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: an input or option is wrong; the message says which.
    """
    began = time.monotonic()
    ending = check_output(out, bed)
    records = TextRecords(sequences) if sequences is not None else open_records(fasta, bed, genome, None)
    classifier = open_classifier(model)
    backbone = classifier.backbone if classifier is not None else model
    assert not isinstance(backbone, Classifier)
    with opened(backbone, device) as ready:
        if classifier is not None:
            classifier.to(ready.device).eval()
        effects = Effects(ready, methods or (["head"] if classifier else ["llr"]), classifier, batch_size)
        run = Run(effects, records, context, ready.model.max_length)
        provenance = {
            "genossm": genossm.__version__,
            **ready.provenance(),
            "methods": effects.methods,
            "context": context,
            "coordinates": "0-based half-open",
        }
        schema = tables.with_provenance(run.schema, provenance)
        total = int(records.lengths.sum())
        if out is None:
            with Progress("mutating", total, "bp") as run.progress:
                batches = [run.batch(part, schema) for part in range(len(run.parts))]
            rows = pa.Table.from_batches(batches, schema)
            return Mutagenesis(None, time.monotonic() - began, _table=rows)
        identity = {"verb": "ism", **provenance, "inputs": records.identity(), "out": ending}
        job = Job(out, identity, len(run.parts), Shard.parse(shard), overwrite)

        def join(paths: Sequence[Path], path: Path) -> None:
            if ending in tables.TABLE_FORMATS:
                tables.join(paths, path, ending)
            else:
                write_track(paths, path, ending, records, run.parts, effects.columns[0])

        with Progress("mutating", total, "bp") as run.progress:
            complete = job.run(
                lambda part, path: tables.write_part(path, schema, iter([run.batch(part, schema)])), join
            )
    return Mutagenesis(Path(out), time.monotonic() - began, complete)


def check_output(out: str | Path | None, bed: str | Path | None) -> str:
    """Return the ending of the output's name.

    Raises:
        ValueError: no such format, no package for it, or a track of sequences that lie on no genome.
    """
    ending = tables.check_format(out, FORMATS) if out is not None else ""
    if ending in (".bedgraph", ".bw") and bed is None:
        raise ValueError(f"A {ending} track lies on a genome: give bed and genome.")
    if ending == ".bw" and not installed("pybigtools"):
        raise ValueError("Writing .bw needs the package pybigtools: pip install 'genossm[io]'; or write .bedgraph.")
    return ending


class Run:
    """The mutagenesis of some regions: its parts and how each is computed.

    Args:
        effects: the comparison.
        records: the regions.
        context: bases that the model sees around each interval, or None.
        limit: longest input of the model.

    Raises:
        ValueError: a region is longer than the model's input, or the context can't be had.
    """

    def __init__(self, effects: Effects, records: Records, context: int | None, limit: int | None):
        self.effects, self.records, self.context = effects, records, context
        self.progress: Progress | None = None
        if context is not None and not isinstance(records, BedRecords):
            raise ValueError("context needs intervals on a genome: give bed and genome.")
        longest = max(int(records.lengths.max()), context or 0)
        if limit is not None and longest > limit:
            raise ValueError(f"A region of {longest} bp is longer than the model's input of {limit}; cut it.")
        self.parts = [
            (record, start, min(start + _PART_POSITIONS, int(length)))
            for record, length in enumerate(records.lengths)
            for start in range(0, int(length), _PART_POSITIONS)
        ]
        text, whole = pa.string(), pa.int64()
        fields = [("region", whole), ("name", text), ("chrom", text), ("position", whole), ("strand", text)]
        fields += [("ref", text), ("alt", text), *((name, pa.float64()) for name in effects.columns)]
        self.schema = pa.schema(fields)

    def surrounded(self, record: int) -> tuple[Bytes, int]:
        """Return what the model sees of a region, and where in it the region begins."""
        codes = self.records.codes(record)
        if self.context is None or not isinstance(self.records, BedRecords) or self.context <= len(codes):
            return codes, 0
        place = self.records.intervals[record]
        contig = self.records.genome.codes(place.chrom)
        size = min(self.context, len(contig))
        first = min(max(0, (place.start + place.end - size) // 2), len(contig) - size)
        seen = contig[first : first + size]
        if place.strand == "-":
            return alphabet.reverse_complement(seen), first + size - place.end
        return seen, place.start - first

    def batch(self, part: int, schema: pa.Schema) -> pa.RecordBatch:
        """Return the rows of a part: three a base; N is left out."""
        record, start, end = self.parts[part]
        seen, offset = self.surrounded(record)
        seen = seen & np.uint8(0x7F)
        positions = [at for at in range(start, end) if alphabet.A <= seen[offset + at] <= alphabet.T]
        found = self.effects.substitutions(seen, [offset + at for at in positions])
        rows: list[tuple[Any, ...]] = []
        for at in positions:
            ref = int(seen[offset + at])
            place = self.records.place(record, at, at + 1)
            for base in range(alphabet.A, alphabet.N):
                if base != ref:
                    letters = ("ACGT"[ref - alphabet.A], "ACGT"[base - alphabet.A])
                    rows.append((record, self.records.names[record], place.chrom, place.start, place.strand, *letters))
        if self.progress is not None:
            self.progress.advance(end - start)
        values = found.reshape(len(rows), len(self.effects.columns))
        columns: list[Any] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(7)]
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=False)]
        arrays += [pa.array(column, pa.float64(), from_pandas=True) for column in values.T]
        return pa.record_batch(arrays, schema=schema)


def write_track(
    paths: Sequence[Path], out: Path, ending: str, records: Records, spans: Sequence[tuple[int, int, int]], column: str
) -> None:
    """Write, at each base, minus the mean effect of its substitutions, as bedGraph or bigWig, sorted.

    Bases that several regions share get the mean of their values. In memory stand the bases of overlapping parts alone.

    Args:
        paths: the parts' tables.
        out: the file.
        ending: .bedgraph or .bw.
        records: the regions.
        spans: record, start and end of each part.
        column: the effect.
    """
    assert isinstance(records, BedRecords)
    intervals = _swept(paths, records, spans, column)
    if ending == ".bw":
        import pybigtools

        pybigtools.open(str(out), "w").write(records.genome.contigs, intervals)
        return
    with out.open("w") as handle:
        handle.writelines(f"{chrom}\t{start}\t{end}\t{value:.6g}\n" for chrom, start, end, value in intervals)


def _swept(
    paths: Sequence[Path], records: BedRecords, spans: Sequence[tuple[int, int, int]], column: str
) -> Iterator[tuple[str, int, int, float]]:
    """Yield the track's bases in the order of the genome, reading the parts in the order in which they begin there."""
    contigs = list(records.genome.contigs)
    places = [records.place(*span) for span in spans]
    starts = [(contigs.index(records.genome.resolve(place.chrom)), place.start) for place in places]
    waiting: dict[int, list[float]] = {}
    current = 0

    def flushed(before: float) -> Iterator[tuple[str, int, int, float]]:
        for position in sorted(position for position in waiting if position < before):
            values = waiting.pop(position)
            yield contigs[current], position, position + 1, -sum(values) / len(values)

    for part in sorted(range(len(spans)), key=lambda number: starts[number]):
        rank, start = starts[part]
        yield from flushed(math.inf if rank != current else start)
        current = rank
        for block in tables.read_blocks([paths[part]]):
            for position, value in zip(block["position"].to_pylist(), block[column].to_pylist(), strict=True):
                waiting.setdefault(position, []).append(value)
    yield from flushed(math.inf)
