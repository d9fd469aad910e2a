"""Windows of a genome for pretraining: which bases belong to which split, and which window is number i."""

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genossm.data.base import SPLITS, Batch, shuffled_rows
from genossm.data.transforms import NextToken, Objective, soft_mask_weights
from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.genome import Genome
from genossm.dna.interval import SPLIT_NAMES, Interval, first_overlap, lengths, merge, read_bed
from genossm.dna.tokenizer import CharTokenizer
from genossm.errors import listed
from genossm.ops.strand_copy import strand_copy

logger = logging.getLogger(__name__)

SPLIT_POLICIES = ("auto", "contigs", "blocks")
SAMPLINGS = ("random", "tile", "hyenadna_legacy")
_RETRIES = 64
"""Draws of another window where one holds more N than `max_n` allows."""
_NO_DRAWS = np.random.default_rng(0)
"""For targets that nothing is drawn for."""

Splits = dict[str, list[Interval]]


def split_genome(
    genome: Genome,
    policy: str = "auto",
    val: float = 0.05,
    test: float = 0.05,
    parts: Sequence[Interval] = (),
) -> Splits:
    """Divide a genome, or some intervals of it, into train, val and test with no base in common.

    Args:
        genome: what to divide.
        policy: "contigs" gives whole contigs to a split, "blocks" cuts each contig into its first part for training
            and its last parts for validation and test; "auto" takes contigs where there are at least 8 and no held-out
            one would be larger than twice its share, else blocks.
        val, test: shares of the bases.
        parts: intervals to divide instead of the whole contigs.

    Raises:
        ValueError: an unknown policy, impossible shares, or a split that would be empty.
    """
    if policy not in SPLIT_POLICIES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_POLICIES)}; got {policy!r}.")
    if min(val, test) < 0 or val + test >= 1:
        raise ValueError(f"The shares of val and test must be at least 0 and sum to less than 1; got {val} and {test}.")
    pieces = merge(parts) if parts else [Interval(name, 0, length) for name, length in genome.contigs.items()]
    total = sum(map(len, pieces))
    held = _hold_out_contigs(pieces, total, {"test": test, "val": val}) if policy != "blocks" else None
    if held is None and policy == "contigs":
        raise ValueError(
            f"{len(pieces)} contigs can't be dealt out into val={val:g} and test={test:g}; take split=blocks."
        )
    if held is not None:
        return held
    splits: Splits = {"train": [], "val": [], "test": []}
    for piece in pieces:
        first = piece.end - round(len(piece) * (val + test))
        second = piece.end - round(len(piece) * test)
        for name, start, end in (
            ("train", piece.start, first),
            ("val", first, second),
            ("test", second, piece.end),
        ):
            if end > start:
                splits[name].append(Interval(piece.chrom, start, end))
    return splits


def _hold_out_contigs(pieces: list[Interval], total: int, shares: dict[str, float]) -> Splits | None:
    by_contig: dict[str, list[Interval]] = {}
    for piece in pieces:
        by_contig.setdefault(piece.chrom, []).append(piece)
    if len(by_contig) < 8:
        return None
    sizes = {name: sum(map(len, held)) for name, held in by_contig.items()}
    splits: Splits = {"train": [], "val": [], "test": []}
    remaining = sorted(sizes, key=lambda name: (-sizes[name], name))
    for split, share in shares.items():
        wanted = share * total
        while wanted > 0:
            fitting = [name for name in remaining if sizes[name] <= wanted]
            if not fitting:
                break
            remaining.remove(fitting[0])
            splits[split] += by_contig[fitting[0]]
            wanted -= sizes[fitting[0]]
        if share > 0 and wanted > 0.5 * share * total:
            return None
    splits["train"] = [piece for name in remaining for piece in by_contig[name]]
    return splits


def read_splits(genome: Genome, bed: str | Path, policy: str = "auto", val: float = 0.05, test: float = 0.05) -> Splits:
    """Read the intervals of each split from a BED file: HyenaDNA's chrom/start/end/split, or plain BED.

    Rows whose fourth column is train, valid, val or test go there; where no row has one, the intervals are divided
    by `split_genome`. Contigs that the genome lacks are counted, named and left out.

    Raises:
        ValueError: an interval beyond its contig, a split name that is none, no interval left, or a base in two splits.
    """
    rows = read_bed(bed)
    names = {row.fields[0].lower() for row in rows if row.fields}
    labelled = bool(names & set(SPLIT_NAMES))
    splits: Splits = {name: [] for name in SPLITS}
    missing: dict[str, int] = {}
    plain: list[Interval] = []
    for row in rows:
        interval = row.interval
        try:
            chrom = genome.resolve(interval.chrom)
        except KeyError:
            missing[interval.chrom] = missing.get(interval.chrom, 0) + 1
            continue
        if interval.end > genome.contigs[chrom]:
            raise ValueError(
                f"{bed}, line {row.line}: {interval} reaches beyond its contig of {genome.contigs[chrom]} bp."
                " Is it from another assembly?"
            )
        interval = Interval(chrom, interval.start, interval.end)
        if not labelled:
            plain.append(interval)
            continue
        word = row.fields[0].lower() if row.fields else ""
        if word not in SPLIT_NAMES:
            raise ValueError(f"{bed}, line {row.line}: a split is train, val or test; got {word!r}.")
        splits[SPLIT_NAMES[word]].append(interval)
    if missing:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(missing.items())[:8])
        logger.warning("%s: %d contigs are not in the genome, left out: %s", bed, len(missing), shown)
    if not plain and not any(splits.values()):
        named = "; ".join(f"{name}, {count} interval{'s' * (count > 1)}" for name, count in sorted(missing.items())[:8])
        raise ValueError(
            f"None of the contigs of {bed} ({named}) is in the genome, which has: {listed(genome.contigs, 8)}."
        )
    if plain:
        splits = split_genome(genome, policy, val, test, plain)
    return splits


def fit_windows(splits: Splits, length: int, genome: Genome, join: bool = True) -> Splits:
    """Make every interval long enough for a window, without reaching into another split.

    Intervals shorter than `length` are widened about their middle, as HyenaDNA does; longer ones stay. Those that
    overlap or touch are joined, unless `join` is off: windows then begin where the intervals do.

    Raises:
        ValueError: no contig is long enough, or a widened interval meets another split; it names both.
    """
    longest = max(genome.contigs.values())
    if length > longest:
        raise ValueError(
            f"A window of {length} bp is longer than every contig (the longest has {longest} bp). Set length to at"
            f" most {longest}, or give a genome with longer contigs."
        )
    fitted: Splits = {}
    for name, intervals in splits.items():
        wide: list[Interval] = []
        for interval in intervals:
            if len(interval) < length:
                size = genome.contigs[interval.chrom]
                if size < length:
                    continue
                start = min(max(0, (interval.start + interval.end - length) // 2), size - length)
                interval = Interval(interval.chrom, start, start + length)
            wide.append(interval)
        fitted[name] = merge(wide) if join else sorted(set(wide))
        if intervals and not wide:
            raise ValueError(
                f"No contig of the {name} split is as long as a window of {length} bp; shorten length or take another"
                " split."
            )
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        pair = first_overlap(fitted[a], fitted[b])
        if pair is not None:
            raise ValueError(
                f"A window of {length} bp could reach from one split into another: {a} {pair[0]} meets {b} {pair[1]}."
                " Shorten length, or give intervals that lie further apart."
            )
    return fitted


class _Room(NamedTuple):
    """Where the windows of one length may begin: places are counted over all intervals, one after the other."""

    ends_I: npt.NDArray[np.int64]
    begins_I: npt.NDArray[np.int64]
    shifts_I: npt.NDArray[np.int64]
    """What makes a base's number in its store of a place in an interval."""


@dataclass(kw_only=True)
class WindowBatches:
    """Batches of windows by number: batch i of a run is a pure function of (seed, i), so nothing needs remembering.

    Args:
        genome: where the bases are.
        intervals: the split's intervals, each at least as long as a window.
        objective: makes inputs and targets of ids.
        tokenizer: makes ids of stored bytes.
        seed: what windows, strands and masks are drawn from.
        reverse_complement: draw each window's strand.
        max_n: largest share of N in a training window; windows above are drawn again.
        soft_mask_weight: loss weight of soft-masked bases.
        sampling: "random" draws positions uniformly from all of the intervals; "tile" takes windows side by side, each
            once a pass, every pass in another order; "hyenadna_legacy" takes the first window of each interval alone,
            as the published loader does.
        shift: tiles are moved by up to so many bases, within their interval.
    """

    genome: Genome
    intervals: list[Interval]
    objective: Objective
    tokenizer: CharTokenizer = field(default_factory=CharTokenizer)
    seed: int = 0
    reverse_complement: bool = True
    max_n: float = 0.5
    soft_mask_weight: float = 1.0
    sampling: str = "random"
    shift: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.max_n <= 1:
            raise ValueError(f"data.max_n must be in (0, 1]; got {self.max_n}.")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"data.sampling must be one of {', '.join(SAMPLINGS)}; got {self.sampling!r}.")
        if self.shift < 0:
            raise ValueError(f"data.shift must be at least 0; got {self.shift}.")
        if not self.intervals:
            raise ValueError("There is no interval to draw windows from.")
        self.sizes = lengths(self.intervals)
        places = [self.genome.place(interval.chrom) for interval in self.intervals]
        self._stores_I = np.array([store for store, _ in places], np.int64)
        starts = [offset + interval.start for (_, offset), interval in zip(places, self.intervals, strict=True)]
        self._firsts_I = np.array(starts, np.int64)
        self._rooms: dict[int, _Room] = {}

    @property
    def keeps_case(self) -> bool:
        """Whether anything asks which bases are soft-masked; else stored bytes become ids while they are copied."""
        return self.soft_mask_weight != 1 or self.tokenizer.lower_case != "upper"

    def span(self, length: int) -> int:
        """Return the bases that a window of `length` tokens takes: one more where the next one is the target."""
        return length + isinstance(self.objective, NextToken)

    def drawn(self, number: int, rows: range, of: int, length: int) -> Batch:
        """Return some rows of training batch `number`, which has `of` rows; see `sampling`.

        A row is a pure function of (seed, number, its place in the batch), however the rows are dealt out.

        Raises:
            ValueError: no window with at most `max_n` N is found.
        """
        span = self.span(length)
        room = self._room(span)
        rng = np.random.default_rng([self.seed, number])
        places, flips = rng.integers(room.ends_I[-1], size=of), rng.random(of) < 0.5
        if self.sampling != "random":
            places = self._tiled_places(number, of, length, rng, room.begins_I)
        turned_B = flips[rows.start : rows.stop] & self.reverse_complement
        codes_BL = np.empty((len(rows), span), np.uint8)
        holds_n = self._copy(codes_BL, places[rows.start : rows.stop], turned_B)
        if self.max_n < 1 and holds_n:
            self._draw_again(codes_BL, number, rows, turned_B)
        seeds = [[self.seed, number, row, _RETRIES] for row in rows]
        return self._batch(codes_BL, seeds, self.objective.in_training(), not (self.keeps_case or holds_n))

    def _room(self, span: int) -> _Room:
        if span not in self._rooms:
            room_I = np.maximum(self.sizes - span + 1, 0)
            ends_I = np.cumsum(room_I)
            begins_I = ends_I - room_I
            self._rooms[span] = _Room(ends_I, begins_I, self._firsts_I - begins_I)
        return self._rooms[span]

    def _copy(self, codes_BL: Bytes, places_B: npt.NDArray[np.int64], turned_B: npt.NDArray[np.bool_]) -> bool:
        """Fill rows with the windows at some places, on the strands asked for; tell whether any holds an N."""
        room = self._room(codes_BL.shape[1])
        which_B = np.searchsorted(room.ends_I, places_B, side="right")
        starts_B, stores_B = places_B + room.shifts_I[which_B], self._stores_I[which_B]
        holds_n = False
        for number in set(stores_B.tolist()):
            store_S, rows_R = self.genome.store(number), np.flatnonzero(stores_B == number)
            holds_n |= strand_copy(store_S, starts_B, turned_B, not self.keeps_case, codes_BL, rows_R)
        return holds_n

    def _draw_again(self, codes_BL: Bytes, number: int, rows: range, turned_B: npt.NDArray[np.bool_]) -> None:
        """Replace windows with more N than `max_n`."""
        span = codes_BL.shape[1]
        last = self._room(span).ends_I[-1]
        many_B = ((codes_BL & np.uint8(0x7F)) == alphabet.N).sum(1) > self.max_n * span
        for index in np.flatnonzero(many_B).tolist():
            row = slice(index, index + 1)
            for attempt in range(_RETRIES):
                again = np.random.default_rng([self.seed, number, rows[index], attempt]).integers(last, size=1)
                self._copy(codes_BL[row], again, turned_B[row])
                if np.count_nonzero((codes_BL[index] & 0x7F) == alphabet.N) <= self.max_n * span:
                    break
            else:
                raise ValueError(
                    f"{_RETRIES} windows of {span} bp in a row held more than {self.max_n:.0%} N; give intervals with"
                    " fewer N, or raise data.max_n."
                )

    def _tiled_places(
        self, number: int, of: int, length: int, rng: np.random.Generator, begins: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return where each row's window begins, counted over the room of all intervals."""
        span = self.span(length)
        step = length if self.sampling == "tile" else max(map(len, self.intervals))
        counts = np.maximum((self.sizes - span) // step + 1, 0)
        last = np.cumsum(counts)
        tiles = np.resize(shuffled_rows(int(last[-1]), of, number, self.seed), of)
        which = np.searchsorted(last, tiles, side="right")
        offsets = (tiles - (last - counts)[which]) * step
        offsets += rng.integers(-self.shift, self.shift + 1, of)
        return begins[which] + np.clip(offsets, 0, self.sizes[which] - span)

    def tiles(self, length: int, limit: int | None = None) -> list[Interval]:
        """Return windows that lie side by side and cover the intervals, at most `limit`, evenly chosen."""
        span = self.span(length)
        tiles = [
            Interval(interval.chrom, start, start + span)
            for interval in self.intervals
            for start in range(interval.start, interval.end - span + 1, length)
        ]
        if limit is not None and len(tiles) > limit:
            tiles = [tiles[i] for i in np.linspace(0, len(tiles) - 1, limit).round().astype(int)]
        if not tiles:
            raise ValueError(f"No interval of the split is as long as a window of {span} bp.")
        return tiles

    def tiled(self, tiles: Sequence[Interval]) -> Batch:
        """Return the batch of fixed windows; masks are drawn from (seed, the window's place)."""
        codes_BL = np.stack([self.genome.fetch(tile) for tile in tiles])
        seeds = [[self.seed, tile.start, zlib.crc32(tile.chrom.encode())] for tile in tiles]
        if not self.keeps_case:
            np.bitwise_and(codes_BL, np.uint8(0x7F), out=codes_BL)
        return self._batch(codes_BL, seeds, self.objective)

    def _batch(self, codes_BL: Bytes, seeds: list[list[int]], objective: Objective, only_bases: bool = False) -> Batch:
        ids_BL = self.tokenizer.from_codes(codes_BL) if self.keeps_case else codes_BL
        if isinstance(objective, NextToken):
            inputs_BL, targets_BL = objective(ids_BL, _NO_DRAWS, only_bases)
        else:
            # Each row has draws of its own, so that it does not matter which process has it.
            rows = [objective(ids_BL[i : i + 1], np.random.default_rng(seed)) for i, seed in enumerate(seeds)]
            inputs_BL, targets_BL = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        batch: Batch = {
            "ids_BL": torch.from_numpy(inputs_BL),
            "targets": torch.from_numpy(targets_BL),
        }
        if self.soft_mask_weight != 1:
            weights_BL = soft_mask_weights(codes_BL, self.soft_mask_weight)
            shifted = weights_BL[:, 1:] if isinstance(objective, NextToken) else weights_BL
            batch["weights_BL"] = torch.from_numpy(np.ascontiguousarray(shifted))
        return batch
