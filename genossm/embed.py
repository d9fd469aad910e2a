"""`genossm embed`: sequences, intervals or whole chromosomes to vectors on disk, in constant memory."""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import genossm
from genossm import tables
from genossm.inference import (
    LAST,
    Batches,
    Opened,
    Tile,
    hidden,
    hidden_after,
    is_recurrent,
    opened,
    strand_codes,
    tiles,
)
from genossm.jobs import Job, Progress, Shard, part_size
from genossm.models.base import Backbone
from genossm.pooling import PART_VALUES, Piece, Pool, Settings
from genossm.records import Records, TextRecords, open_records

logger = logging.getLogger(__name__)

_PART_BASES, _LEAST_BASES = 1 << 22, 1 << 20
"""Bases that a part reads at most, and, where there are enough, at least."""


@dataclass
class Embeddings:
    """What `embed` gives back.

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
        """The rows: places, names and vectors. A Parquet file is read whole."""
        if self._table is None:
            import pyarrow.parquet as pq

            if self.path is None or self.path.suffix != ".parquet":
                raise ValueError(f"{self.path} is no Parquet file; open it with its own library.")
            self._table = pq.read_table(self.path)
        return self._table

    def array(self, layer: str | int | None = None) -> Any:
        """Return the vectors as a matrix (rows, D); `layer` chooses where there are several."""
        names = tables.vector_columns(self.table.schema)
        name = names[0] if layer is None else f"embedding_{layer}"
        if name not in names:
            raise KeyError(f"There is no layer {layer!r}; there are: {', '.join(names)}.")
        return tables.matrix(self.table.column(name))

    def summary(self) -> dict[str, Any]:
        """Return the outcome for the command line."""
        return {"out": self.path, "complete": self.complete, "seconds": round(self.seconds, 2)}


def embed(
    model: str | Path | Backbone,
    sequences: Sequence[str] | None = None,
    *,
    fasta: str | Path | None = None,
    bed: str | Path | None = None,
    genome: str | Path | None = None,
    table: str | Path | None = None,
    out: str | Path | None = None,
    layers: Sequence[str | int] = (LAST,),
    pooling: str = "mean",
    window: int | None = None,
    strand: str = "forward",
    dtype: str = "float32",
    context: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    shard: str | None = None,
    overwrite: bool = False,
) -> Embeddings:
    """Embed sequences: genossm embed --model M (--fasta F | --bed B --genome G | --table T) --out emb.parquet.

    A sequence longer than the context is cut into overlapping tiles; a recurrent model reads it exactly, carrying its
    state. A killed run started again with the same command goes on where it was.

    Args:
        model: a folder that holds a model, or a backbone.
        sequences: texts of DNA, instead of a file.
        fasta: embed the sequences of this FASTA.
        bed: embed the intervals of this BED file, on `genome`.
        genome: FASTA that the BED lies on.
        table: embed the column `sequence` of this .csv, .tsv or .parquet; other columns are kept.
        out: where to write: .parquet, .npy (with .index.tsv), .zarr or .h5ad; in Python, None keeps it in memory.
        layers: last (after the final norm), or 0 (the embedding) to the number of blocks; several with commas.
        pooling: mean, max, first or last over each row's bases, or base for one row a base.
        window: bases of one row; by default the whole sequence is one.
        strand: forward, average (of both strands) or concat.
        dtype: float32 or float16.
        context: tokens run at once; by default as many as the model takes.
        overlap: tokens that neighbouring tiles share; by default an eighth of the context.
        batch_size: rows of a batch at most; by default as many as memory holds.
        device: cpu or cuda; by default the GPU if there is one.
        shard: i/n computes every n-th part; the shard that finishes last joins them.
        overwrite: replace an existing output.

    Returns:
        The output's path, or the rows in memory.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: an input or option is wrong; the message says which.
        MemoryError: a single sequence of `context` tokens doesn't fit.
    """
    began = time.monotonic()
    ending = tables.check_format(out, tables.VECTOR_FORMATS) if out is not None else ""
    if ending == ".npy" and len(layers) > 1:
        raise ValueError(f"A .npy file holds one layer; got {len(layers)}. Use .parquet, .zarr or .h5ad.")
    texts = TextRecords(sequences) if sequences is not None else None
    records = texts or open_records(fasta, bed, genome, table)
    with opened(model, device) as ready:
        length = ready.context if context is None else context
        settings = Settings(
            layers=check_layers(layers, ready),
            pooling=pooling,
            window=window,
            strand=strand,
            dtype=dtype,
            context=length,
            overlap=length // 8 if overlap is None else overlap,
        )
        check_context(settings, ready)
        run = Run(ready, records, settings, batch_size)
        if out is None:
            with Progress("embedding", int(records.lengths.sum()), "bp") as run.progress:
                batches = [batch for part in range(len(run.parts)) for batch in run.batches(part)]
            return Embeddings(None, time.monotonic() - began, _table=pa.Table.from_batches(batches, run.schema))
        job = Job(out, {**run.identity(), "out": ending}, len(run.parts), Shard.parse(shard), overwrite)
        index = Path(out).with_suffix(".index.tsv") if ending == ".npy" else None
        owned = [part for part in range(len(run.parts)) if job.shard.owns(part) and not job.path_of(part).exists()]
        with Progress("embedding", run.bases(owned), "bp") as run.progress:
            complete = job.run(
                lambda part, path: tables.write_part(path, run.schema, run.batches(part)),
                lambda paths, path: tables.join(paths, path, ending, index),
            )
    return Embeddings(Path(out), time.monotonic() - began, complete)


def check_layers(layers: Sequence[str | int], ready: Opened) -> tuple[str, ...]:
    """Return the layers' names.

    Raises:
        ValueError: the model has no such layer, or none was asked for.
    """
    count = len(ready.model.layers)
    known = [*(str(number) for number in range(count + 1)), LAST]
    names = tuple(str(layer) for layer in layers)
    wrong = [name for name in names if name not in known]
    if wrong or not names or len(set(names)) < len(names):
        raise ValueError(
            f"layers must be different ones of {', '.join(known)} (0 is the embedding, {count} the output of the last"
            f" block, last that after the final norm); got {', '.join(wrong or names) or 'none'}."
        )
    return names


def check_context(settings: Settings, ready: Opened) -> None:
    """Refuse a context that the model can't run, or rows that its tokens can't give.

    Raises:
        ValueError: so it is.
    """
    limit = ready.model.max_length
    if settings.context < 1 or (limit is not None and settings.context > limit):
        raise ValueError(f"context must be in 1..{limit or 'any'} for this model; got {settings.context}.")
    if not 0 <= settings.overlap < settings.context:
        raise ValueError(f"overlap must be in 0..{settings.context - 1}, below the context; got {settings.overlap}.")
    if ready.tokenizer.bases_per_token > 1 and (settings.window or settings.pooling == "base"):
        raise ValueError(
            f"A token of this model is {ready.tokenizer.bases_per_token} bases, so it has no vector of its own for each"
            " base; leave window out and pool whole sequences."
        )


class Run:
    """One embedding of some records: its parts and how each is computed.

    Args:
        ready: the model.
        records: what to embed.
        settings: how.
        batch_size: rows of a batch at most.
    """

    def __init__(self, ready: Opened, records: Records, settings: Settings, batch_size: int | None):
        self.ready, self.records, self.settings = ready, records, settings
        self.sizing = Batches(ready.device, batch_size)
        self.progress: Progress | None = None
        self.carries = is_recurrent(ready)
        self.per_base = ready.tokenizer.bases_per_token == 1
        codes = records.codes(0)[: 2 * ready.tokenizer.bases_per_token]
        sample = hidden(ready, ready.ids(codes)[None].to(ready.device), None, settings.layers)
        self.widths = [x_BLD.shape[2] for x_BLD in sample]
        self.parts = self._cut()
        self.schema = tables.with_provenance(self._schema(), self.provenance())

    def provenance(self) -> dict[str, Any]:
        """Return what the output says about itself."""
        kept = {name: getattr(self.settings, name) for name in Settings.__dataclass_fields__}
        return {
            "genossm": genossm.__version__,
            **self.ready.provenance(),
            **kept,
            "coordinates": "0-based half-open",
            "inputs": {key: value["name"] for key, value in self.records.identity().items() if isinstance(value, dict)},
        }

    def identity(self) -> dict[str, Any]:
        """Return what makes this job the same as another one."""
        return {"verb": "embed", **self.provenance(), "inputs": self.records.identity()}

    def bases(self, parts: Sequence[int]) -> int:
        """Return the bases of some parts."""
        return sum(piece.end - piece.start for part in parts for piece in self.parts[part])

    def is_carried(self, record: int) -> bool:
        """Tell whether a record is read in one go, carrying the state."""
        return self.carries and int(self.records.lengths[record]) > self.settings.context

    def _cut(self) -> list[list[Piece]]:
        """Cut the records into pieces and those into parts of bounded size."""
        parts: list[list[Piece]] = [[]]
        bases = values = 0
        most_rows = max(1, PART_VALUES // sum(self.widths))
        most_bases = part_size(int(self.records.lengths.sum()), _PART_BASES, _LEAST_BASES)
        for record, length in enumerate(self.records.lengths.tolist()):
            step = self.settings.step(length)
            size = length if self.is_carried(record) else step * max(1, min(most_rows, _PART_BASES // 4 // step))
            for start in range(0, length, size):
                piece = Piece(record, start, min(start + size, length), step)
                if parts[-1] and (bases + piece.end - start > most_bases or values + piece.rows > most_rows):
                    parts.append([])
                    bases = values = 0
                parts[-1].append(piece)
                bases, values = bases + piece.end - start, values + piece.rows
        return parts

    def _schema(self) -> pa.Schema:
        sides = 2 if self.settings.strand == "concat" else 1
        kind = pa.float16() if self.settings.dtype == "float16" else pa.float32()
        single = len(self.settings.layers) == 1
        fields = [
            ("name", pa.string()),
            ("chrom", pa.string()),
            ("start", pa.int64()),
            ("end", pa.int64()),
            ("strand", pa.string()),
        ]
        if self.records.columns is not None:
            fields += [(column.name, column.type) for column in self.records.columns.schema]
        for layer, width in zip(self.settings.layers, self.widths, strict=True):
            fields.append(("embedding" if single else f"embedding_{layer}", pa.list_(kind, width * sides)))
        return pa.schema(fields)

    def batches(self, part: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a part."""
        pieces = self.parts[part]
        with tempfile.TemporaryDirectory(prefix="genossm-") as scratch:
            pools = [
                {strand: Pool(piece, self.settings, self.widths, strand, Path(scratch)) for strand in self._strands()}
                for piece in pieces
            ]
            waiting: list[tuple[Tile, int, str]] = []
            for number, piece in enumerate(pieces):
                for strand in self._strands():
                    if self.is_carried(piece.record):
                        self._carry(piece, pools[number][strand])
                    else:
                        waiting += [(tile, number, strand) for tile in self._tiles(piece, strand)]
            self._run_tiles(pieces, pools, waiting)
            for piece, pool in zip(pieces, pools, strict=True):
                yield from self._rows(piece, pool)

    def _strands(self) -> tuple[str, ...]:
        return ("+",) if self.settings.strand == "forward" else ("+", "-")

    def _tiles(self, piece: Piece, strand: str) -> list[Tile]:
        """Return the tiles of a piece, in coordinates along the strand."""
        length = int(self.records.lengths[piece.record])
        if not self.per_base:
            return [Tile(0, length, 0, length)]
        start, end = (piece.start, piece.end) if strand == "+" else (length - piece.end, length - piece.start)
        return tiles(start, end, length, self.settings.context, self.settings.overlap, self.ready.model.causal)

    def _tile_ids(self, piece: Piece, tile: Tile, strand: str) -> Tensor:
        codes = self.records.codes(piece.record)
        start, end = (tile.start, tile.end) if strand == "+" else (len(codes) - tile.end, len(codes) - tile.start)
        ids_L = self.ready.ids(strand_codes(codes[start:end], strand))
        limit = self.ready.model.max_length
        if not self.per_base and limit is not None and len(ids_L) > limit:
            raise ValueError(
                f"Sequence {self.records.names[piece.record]!r} has {len(ids_L)} tokens; this model takes at most"
                f" {limit}. Cut it into shorter ones."
            )
        return ids_L

    def _run_tiles(
        self, pieces: Sequence[Piece], pools: Sequence[dict[str, "Pool"]], waiting: Sequence[tuple[Tile, int, str]]
    ) -> None:
        def call(rows: list[int]) -> None:
            chosen = [waiting[row] for row in rows]
            ids = [self._tile_ids(pieces[number], tile, strand) for tile, number, strand in chosen]
            ids_BL, lengths_B = self.ready.stack(ids)
            layers = hidden(self.ready, ids_BL, lengths_B, self.settings.layers)
            found = [
                pools[number][strand].reduce(
                    [x[row, : len(ids[row])] for x in layers], tile, int(self.records.lengths[pieces[number].record])
                )
                for row, (tile, number, strand) in enumerate(chosen)
            ]
            # One copy to the host a batch.
            for layer in range(len(layers)):
                host = torch.cat([values[layer] for _, values in found]).float().cpu().numpy()
                at = 0
                for (_, number, strand), (first, values) in zip(chosen, found, strict=True):
                    count = len(values[layer])
                    pools[number][strand].add(layer, first, host[at : at + count])
                    at += count
            self._count(sum(tile.keep_end - tile.keep_start for tile, _, _ in chosen) // len(self._strands()))

        self.sizing.run([tile.end - tile.start for tile, _, _ in waiting], call)

    def _carry(self, piece: Piece, pool: "Pool") -> None:
        """Read a whole record with a state that is carried from chunk to chunk."""
        model = self.ready.model
        codes = self.records.codes(piece.record)
        state = model.init_state(1)
        for start in range(0, len(codes), self.settings.context):
            end = min(start + self.settings.context, len(codes))
            tile = Tile(start, end, start, end)
            ids_BL = self._tile_ids(piece, tile, pool.strand)[None].to(self.ready.device)
            found, state = hidden_after(self.ready, ids_BL, state, self.settings.layers)
            first, values = pool.reduce([x_BLD[0] for x_BLD in found], tile, len(codes))
            for layer, pooled in enumerate(values):
                pool.add(layer, first, pooled.float().cpu().numpy())
            self._count((end - start) // len(self._strands()))

    def _count(self, bases: int) -> None:
        # Pages of the genome that were read would else count as memory of this process until its end.
        self.records.release()
        if self.progress is not None:
            self.progress.advance(bases)

    def _rows(self, piece: Piece, pool: dict[str, "Pool"]) -> Iterator[pa.RecordBatch]:
        """Yield a piece's rows, the strands combined, a block at a time."""
        block = max(1, (1 << 22) // sum(self.widths))
        for first in range(0, piece.rows, block):
            rows = range(first, min(first + block, piece.rows))
            spans = [
                (piece.start + row * piece.step, min(piece.start + (row + 1) * piece.step, piece.end)) for row in rows
            ]
            places = [self.records.place(piece.record, start, end) for start, end in spans]
            columns: list[Any] = [
                [self.records.names[piece.record]] * len(rows),
                [place.chrom for place in places],
                [place.start for place in places],
                [place.end for place in places],
                [place.strand for place in places],
            ]
            if self.records.columns is not None:
                taken = self.records.columns.take(pa.array([piece.record] * len(rows)))
                columns += [column.combine_chunks() for column in taken.columns]
            counts = np.array([end - start for start, end in spans], dtype=np.float32)[:, None]
            for layer in range(len(self.widths)):
                sides = [pool[strand].values(layer, rows, counts) for strand in self._strands()]
                values = np.concatenate(sides, 1) if self.settings.strand == "concat" else sum(sides) / len(sides)
                columns.append(tables.vectors(values, self.settings.dtype))
            arrays = [
                pa.array(c, f.type) if isinstance(c, list) else c for c, f in zip(columns, self.schema, strict=True)
            ]
            yield pa.record_batch(arrays, schema=self.schema)
