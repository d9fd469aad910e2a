"""Pooling of hidden states into rows: whole sequences, windows or single bases, whatever tiles they come in."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genossm.inference import LAST, Tile

POOLINGS = ("mean", "max", "first", "last", "base")
STRANDS = ("forward", "average", "concat")
PART_VALUES = 1 << 24
"""Numbers of a piece that are held in memory at most."""


@dataclass(frozen=True)
class Settings:
    """What is computed from each sequence.

    Raises:
        ValueError: a value is not among those allowed.
    """

    layers: tuple[str, ...] = (LAST,)
    """`last` (after the final norm), or 0 (the embedding) to the number of blocks: the residual stream after each."""
    pooling: str = "mean"
    window: int | None = None
    """Bases pooled into one row; None: the whole sequence."""
    strand: str = "forward"
    dtype: str = "float32"
    context: int = 1024
    """Tokens that are run at once."""
    overlap: int = 0
    """Tokens that neighbouring tiles of a long sequence share."""

    def __post_init__(self) -> None:
        for name, allowed in (("pooling", POOLINGS), ("strand", STRANDS), ("dtype", ("float32", "float16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 base; got {self.window}.")

    def step(self, length: int) -> int:
        """Return how many bases of a sequence become one row."""
        return 1 if self.pooling == "base" else min(self.window or length, length)


@dataclass(frozen=True)
class Piece:
    """`[start, end)` of a record, cut between rows: the unit of which parts are made."""

    record: int
    start: int
    end: int
    step: int

    @property
    def rows(self) -> int:
        """Rows that the piece gives."""
        return -(-(self.end - self.start) // self.step)


class Pool:
    """The rows of one piece on one strand while its tiles come in, in any order.

    Args:
        piece: what the rows cover.
        settings: the pooling.
        widths: D of each layer.
        strand: the strand that is read; `first` and `last` are meant along it, rows are in forward order.
        scratch: a folder for rows that should not stay in memory.
    """

    def __init__(self, piece: Piece, settings: Settings, widths: Sequence[int], strand: str, scratch: Path):
        self.piece, self.pooling, self.strand = piece, settings.pooling, strand
        start = -math.inf if settings.pooling == "max" else 0.0
        self.arrays: list[Any] = []
        for layer, width in enumerate(widths):
            shape = (piece.rows, width)
            if piece.rows * width > PART_VALUES:
                name = scratch / f"{piece.record}.{strand}.{layer}"
                array = np.memmap(name, dtype=np.float32, mode="w+", shape=shape)
                if start:
                    array[:] = start
            else:
                array = np.full(shape, start, dtype=np.float32)
            self.arrays.append(array)
        self.tokens = 0

    def reduce(self, layers: Sequence[Tensor], tile: Tile, length: int) -> tuple[int, list[Tensor]]:
        """Pool the kept positions of a tile.

        Args:
            layers: x_LD of each layer, along the strand.
            tile: which positions these are, along the strand.
            length: bases of the record.

        Returns:
            The first row and, for each layer, what to add to it and those after it.
        """
        if len(layers[0]) != tile.end - tile.start:
            # Tokens of several bases: the record is one row, whatever its number of tokens.
            self.tokens = len(layers[0])
            return 0, [self._pool(x_LD, [len(x_LD)], (True, True)) for x_LD in layers]
        kept = [x_LD[tile.keep_start - tile.start : tile.keep_end - tile.start] for x_LD in layers]
        start, end = tile.keep_start, tile.keep_end
        if self.strand == "-":
            kept = [x_KD.flip(0) for x_KD in kept]
            start, end = length - end, length - start
        step, offset = self.piece.step, self.piece.start
        first, last = (start - offset) // step, (end - 1 - offset) // step
        cuts = [start, *(offset + row * step for row in range(first + 1, last + 1)), end]
        sizes = [after - before for before, after in itertools.pairwise(cuts)]
        whole = ((start - offset) % step == 0, end == min(offset + (last + 1) * step, self.piece.end))
        return first, [self._pool(x_KD, sizes, whole) for x_KD in kept]

    def _pool(self, x_KD: Tensor, sizes: list[int], whole: tuple[bool, bool]) -> Tensor:
        """Return one vector for each run of positions; `whole`: whether first and last run begin and end their row."""
        x_KD = x_KD.float()
        if self.pooling == "base":
            return x_KD
        if self.pooling in ("first", "last"):
            edges = torch.tensor([0, *sizes], device=x_KD.device).cumsum(0)
            at_start = (self.pooling == "first") == (self.strand == "+")
            picked = x_KD[edges[:-1] if at_start else edges[1:] - 1].clone()
            if at_start and not whole[0]:
                picked[0] = 0
            if not at_start and not whole[1]:
                picked[-1] = 0
            return picked
        if len(sizes) == 1:
            return (x_KD.amax(0) if self.pooling == "max" else x_KD.sum(0))[None]
        reduction = "max" if self.pooling == "max" else "sum"
        return torch.segment_reduce(x_KD.contiguous(), reduction, lengths=torch.tensor(sizes, device=x_KD.device))

    def add(self, layer: int, first: int, values: Any) -> None:
        """Join pooled vectors into the rows from `first` on."""
        rows = self.arrays[layer][first : first + len(values)]
        if self.pooling == "max":
            np.maximum(rows, values, out=rows)
        else:
            rows += values

    def values(self, layer: int, rows: range, counts: Any) -> Any:
        """Return finished rows; `counts` are the positions of each."""
        found = np.asarray(self.arrays[layer][rows.start : rows.stop])
        if self.pooling != "mean":
            return found
        return found / (self.tokens or counts)
