"""How trained models are run: opened, on tiles of long sequences, in batches that fit into memory.

Used by `embed`, `score`, `ism` and `generate`. Everything here runs without gradients, and a result does not depend
on what else stands in its batch.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genossm import checkpoint
from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.tokenizer import Tokenizer, tokenizer_named
from genossm.models.base import Backbone, State

logger = logging.getLogger(__name__)

LAST = "last"
"""The layer after the final norm."""
UNLIMITED = 32768
"""Tokens run at once by a model that has no longest input."""
TOKENS = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Tokens of a batch to start with, by kind of device; halved where they don't fit."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run: in eval mode, with its tokenizer, and a digest of its weights."""

    model: Backbone
    tokenizer: Tokenizer
    device: torch.device
    name: str
    digest: str

    @property
    def context(self) -> int:
        """Tokens that are run at once."""
        return self.model.max_length or UNLIMITED

    def provenance(self) -> dict[str, Any]:
        """Return what an output says about the model that made it."""
        return {"model": self.name, "model_type": self.model.config.model_type, "weights": self.digest}

    def ids(self, codes: Bytes) -> Tensor:
        """Return the tokens of stored bases."""
        return torch.from_numpy(np.ascontiguousarray(self.tokenizer.from_codes(codes)))

    def stack(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return ids_BL on the device, padded on the right, and the lengths where they differ."""
        longest = max(len(row) for row in rows)
        if all(len(row) == longest for row in rows):
            return self._sent(torch.stack(list(rows))), None
        ids_BL = torch.full((len(rows), longest), self.tokenizer.pad_id, dtype=rows[0].dtype)
        for row_BL, row in zip(ids_BL, rows, strict=True):
            row_BL[: len(row)] = row
        return self._sent(ids_BL), self._sent(torch.tensor([len(row) for row in rows]))

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, without waiting for what a GPU still has to do."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


@contextlib.contextmanager
def opened(source: str | Path | Backbone, device: str | None = None) -> Iterator[Opened]:
    """Open a model for inference; a caller's own model comes back on its device and in its mode.

    Args:
        source: a folder that `checkpoint.load` opens, or a backbone.
        device: where to run; None takes the GPU if there is one, or where a given backbone already is.

    Raises:
        FileNotFoundError, ValueError: no such model, or no such device.
    """
    if isinstance(source, Backbone):
        before, training = next(source.parameters()).device, source.training
        model, name = source, type(source).__name__
        target = torch.device(device) if device else before
    else:
        target = torch.device(device or default_device())
        model, name = checkpoint.load(source), Path(source).name
        before, training = target, False
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(target)!r} was asked for, but there is no CUDA device; use cpu.")
    # What a caller's own model caches must stay usable in training, which inference tensors are not.
    guard = torch.no_grad() if isinstance(source, Backbone) else torch.inference_mode()
    try:
        model.to(target).eval()
        with guard:
            yield Opened(model, tokenizer_of(model), target, name, weights_digest(model))
    finally:
        model.to(before).train(training)


def default_device() -> str:
    """Return the GPU of this process's rank, or the CPU."""
    import os

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def tokenizer_of(model: Backbone) -> Tokenizer:
    """Return the tokenizer that a model's ids come from.

    Raises:
        ValueError: there is none of that name.
    """
    return tokenizer_named(model.config.tokenizer)


def weights_digest(model: Backbone) -> str:
    """Return a digest of a model's shape and weights: equal for equal models, wherever they lie."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class Batches:
    """Batches of rows by length, with as many tokens as memory holds: halved for good where it runs out.

    Args:
        device: where the model runs.
        rows: rows of a batch at most; None lets the tokens decide.
    """

    def __init__(self, device: torch.device, rows: int | None = None):
        if rows is not None and rows < 1:
            raise ValueError(f"batch_size must be at least 1; got {rows}.")
        self.rows = rows
        self.tokens = TOKENS.get(device.type, TOKENS["cpu"])

    def run(self, lengths: Sequence[int], call: Callable[[list[int]], None]) -> None:
        """Call `call(rows)` until every row was in one batch, rows of similar length together.

        Args:
            lengths: tokens of each row.
            call: runs the rows of these numbers; it must have no effect where memory runs out in it.

        Raises:
            MemoryError: a single row does not fit.
        """
        waiting = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        while waiting:
            count = self._count(lengths, waiting)
            try:
                call(waiting[:count])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                longest = lengths[waiting[count - 1]]
                if count == 1:
                    raise MemoryError(
                        f"One row of {longest} tokens does not fit into memory; use a shorter context or a larger GPU."
                    ) from None
                self.tokens = max(longest, count * longest // 2)
                self.rows = max(1, count // 2) if self.rows is not None else None
                logger.warning("out of memory with %d rows of %d tokens; going on with half", count, longest)
                continue
            del waiting[:count]

    def _count(self, lengths: Sequence[int], waiting: Sequence[int]) -> int:
        """Return how many of the waiting rows fit into the next batch."""
        count = 1
        while (
            count < len(waiting)
            and (self.rows is None or count < self.rows)
            and (count + 1) * lengths[waiting[count]] <= self.tokens
        ):
            count += 1
        return count


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on the GPU or the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass(frozen=True)
class Tile:
    """`[start, end)` of a sequence is run; of its positions `[keep_start, keep_end)`, in the sequence, are kept."""

    start: int
    end: int
    keep_start: int
    keep_end: int


def tiles(start: int, end: int, length: int, context: int, overlap: int, causal: bool) -> list[Tile]:
    """Cut `[start, end)` of a sequence into tiles of at most `context` positions.

    Args:
        start, end: what is to be covered, each position kept by exactly one tile.
        length: of the whole sequence, from whose rest the tiles take their context.
        context: positions of a tile.
        overlap: positions that a tile shares with its neighbour; a causal model gets them all on the left.
        causal: whether the model sees only what is left of a position.

    Raises:
        ValueError: the overlap leaves nothing of a tile.
    """
    if not 0 <= overlap < context:
        raise ValueError(f"overlap must be in 0..{context - 1}, below the context; got {overlap}.")
    if length <= context:
        return [Tile(0, length, start, end)]
    left = overlap if causal else (overlap + 1) // 2
    right = overlap - left
    made: list[Tile] = []
    at = start
    while at < end:
        first = min(max(0, at - left), length - context)
        stop = first + context
        keep = length if stop == length else stop - right
        made.append(Tile(first, stop, at, min(keep, end)))
        at = keep
    return made


def strand_codes(codes: Bytes, strand: str) -> Bytes:
    """Return a sequence read on strand `+` or `-`."""
    return alphabet.reverse_complement(codes) if strand == "-" else codes


def select_rows(state: Any, rows_B: Tensor) -> Any:
    """Return a copy of a streaming state with its rows chosen, repeated or reordered."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows_B) if state.ndim else state.clone()
    if isinstance(state, dict):
        return {key: select_rows(value, rows_B) for key, value in state.items()}
    if isinstance(state, list):
        return [select_rows(value, rows_B) for value in state]
    if isinstance(state, tuple):
        return tuple(select_rows(value, rows_B) for value in state)
    return state


def join_rows(states: Sequence[Any]) -> Any:
    """Return one streaming state of the rows of several, for models whose states don't grow."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, dict):
        return {key: join_rows([state[key] for state in states]) for key in first}
    if isinstance(first, list):
        return [join_rows(list(parts)) for parts in zip(*states, strict=True)]
    # How much was read, which only models with a longest input look at.
    return max(states)


def state_bytes(state: Any) -> int:
    """Return the size of a streaming state's tensors."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(state_bytes(value) for value in state.values())
    return sum(map(state_bytes, state)) if isinstance(state, Sequence) else 0


def is_recurrent(opened_model: Opened) -> bool:
    """Tell whether a model carries a state whose size does not grow with what it has read, over any length."""
    model = opened_model.model
    if not (model.streams and model.causal) or model.max_length is not None:
        return False
    ids_BL = torch.full((1, 5), int(opened_model.ids(np.array([alphabet.A], np.uint8))[0]), device=opened_model.device)
    _, state = model.extend(ids_BL, model.init_state(1))
    before = state_bytes(state)
    _, state = model.extend(ids_BL, state)
    return state_bytes(state) == before


def extend(model: Backbone, ids_BL: Tensor, state: State) -> tuple[Tensor, State]:
    """Run more tokens in pieces, so that activations stay small; the hidden states are joined."""
    pieces: list[Tensor] = []
    for piece_BL in ids_BL.split(UNLIMITED, dim=1):
        x_BLD, state = model.extend(piece_BL, state)
        pieces.append(x_BLD)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), state


def hidden(ready: Opened, ids_BL: Tensor, lengths_B: Tensor | None, layers: Sequence[str]) -> list[Tensor]:
    """Return the hidden states of the layers that are asked for, each (B, L, D)."""
    model = ready.model
    if tuple(layers) == (LAST,):
        return [model(ids_BL, lengths_B)]
    model.check(ids_BL, lengths_B)
    seen = _Seen(layers)
    x_BLD = model.embed(ids_BL)
    seen(-1, x_BLD)
    x_BLD = model.run_layers(x_BLD, lengths_B, seen)
    return seen.found(lambda: model.norm_f(x_BLD))


def hidden_after(ready: Opened, ids_BL: Tensor, state: State, layers: Sequence[str]) -> tuple[list[Tensor], State]:
    """Run more tokens after those that made `state`: what `hidden` would give there, and the state after them."""
    seen = _Seen(layers)
    if "0" in layers:
        seen(-1, ready.model.embed(ids_BL))
    x_BLD, state = ready.model.extend(ids_BL, state, seen)
    return seen.found(lambda: x_BLD), state


class _Seen:
    """Keeps the residual stream after the blocks that are asked for.

    Args:
        layers: their names: `0` is the embedding, `last` comes after the final norm.
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = layers
        self.kept: dict[str, Tensor] = {}

    def __call__(self, block: int, x_BLD: Tensor) -> None:
        if str(block + 1) in self.layers:
            self.kept[str(block + 1)] = x_BLD.clone()

    def found(self, last: Callable[[], Tensor]) -> list[Tensor]:
        """Return all layers in the order asked for; `last()` gives that after the final norm."""
        return [last() if layer == LAST else self.kept[layer] for layer in self.layers]
