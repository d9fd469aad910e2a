"""Heads: one answer a sequence (or a position) from the hidden states of a backbone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

POOLINGS = ("mean", "max", "first", "last", "sum", "center")
HEAD_POOLINGS = (*POOLINGS, "attention", "none")
"""What a head may do besides: weigh the positions by a learned score, or answer each position."""
CENTER = 4
"""Positions on each side of the middle of a row that "center" averages."""
POSITIONAL = ("mean", "sum", "first", "last")
"""Poolings that can answer several positions, where "mean" and "sum" run along the row."""


def pool(x_BLD: Tensor, mode: str, lengths_B: Tensor | None = None) -> Tensor:
    """Return one vector a row from the real positions alone.

    Args:
        x_BLD: hidden states.
        mode: one of `POOLINGS`.
        lengths_B: number of real positions of each row, on the left; None: all are real.

    Returns:
        x_BD.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {mode!r}.")
    if mode == "first":
        return x_BLD[:, 0]
    if lengths_B is None:
        lengths_B = torch.full((x_BLD.shape[0],), x_BLD.shape[1], device=x_BLD.device)
    if mode == "last":
        return x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), lengths_B.long() - 1]
    padding_BL1 = (torch.arange(x_BLD.shape[1], device=x_BLD.device) >= lengths_B[:, None])[..., None]
    if mode == "max":
        return x_BLD.masked_fill(padding_BL1, -torch.inf).amax(1)
    if mode == "center":
        # Of a row of even length the middle lies between two positions, so the window is its own mirror image.
        twice_BL = 2 * torch.arange(x_BLD.shape[1], device=x_BLD.device) + 1 - lengths_B[:, None]
        outside_BL1 = (twice_BL.abs() > 2 * CENTER)[..., None] | padding_BL1
        return x_BLD.masked_fill(outside_BL1, 0).sum(1) / (~outside_BL1).sum(1).to(x_BLD.dtype)
    total_BD = x_BLD.masked_fill(padding_BL1, 0).sum(1)
    return total_BD if mode == "sum" else total_BD / lengths_B[:, None].to(x_BLD.dtype)


def running(x_BLD: Tensor, mode: str, positions: int | None, lengths_B: Tensor | None = None) -> Tensor:
    """Return the vectors of several positions: the first or last ones of each row, as they are or run up to there.

    Args:
        x_BLD: hidden states.
        mode: one of `POSITIONAL`; "mean" and "sum" are of all positions up to each one.
        positions: P, how many; None: all L, in which nothing is cut for padding.
        lengths_B: number of real positions of each row, on the left; None: all are real.

    Returns:
        x_BPD.

    Raises:
        ValueError: a row has fewer than P positions.
    """
    index_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
    if mode in ("mean", "sum"):
        x_BLD = x_BLD.cumsum(1)
    if mode == "mean":
        x_BLD = x_BLD / (index_L + 1)[:, None].to(x_BLD.dtype)
    if positions is None:
        return x_BLD
    shortest = x_BLD.shape[1] if lengths_B is None else int(lengths_B.min())
    if shortest < positions:
        raise ValueError(f"This head answers {positions} positions of a row; the shortest row has {shortest}.")
    if mode == "first":
        return x_BLD[:, :positions]
    if lengths_B is None:
        return x_BLD[:, -positions:]
    index_BP = lengths_B.long()[:, None] - positions + index_L[:positions]
    return x_BLD.gather(1, index_BP[..., None].expand(-1, -1, x_BLD.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The shape of a sequence head; its values are written to config.json.

    Raises:
        ValueError: a value is impossible.
    """

    n_outputs: int
    """Classes, labels or regression targets C."""
    pooling: str = "mean"
    """One of `HEAD_POOLINGS`; "none" answers each position."""
    bias: bool = True
    """Whether the last linear layer has a bias."""
    strands: int = 1
    """2 where the hidden states are both strands side by side (Caduceus-PS): each is answered, the answers averaged."""
    hidden: bool = False
    """Put a tanh layer of width D before the last one (the classifier of ESM and the Nucleotide Transformer)."""
    dropout: float = 0.0
    """Dropout of what enters each linear layer."""
    bin: int = 1
    """Positions whose mean gets one answer, where `pooling` is "none"."""
    kind: str = ""
    """What is predicted: the kind of the target that the head was trained on."""
    names: tuple[str, ...] = ()
    """Names of the answers, in their order."""
    positions: int | None = 0
    """How many positions to answer, counted from the end ("first": from the start), with running means and sums: the
    `l_output` of the published fine-tuning code of HyenaDNA. 0: one answer, without an axis; None: every position."""
    pad_id: int | None = None
    """Where set, a row ends before its first such id, or at its end if it has none or begins with one, and padding
    masks are not looked at (what the published HyenaDNA classifier does)."""

    def __post_init__(self) -> None:
        if self.n_outputs < 1:
            raise ValueError(f"n_outputs must be at least 1; got {self.n_outputs}.")
        if self.pooling not in HEAD_POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(HEAD_POOLINGS)}; got {self.pooling!r}.")
        if self.bin < 1 or (self.bin > 1 and self.pooling != "none"):
            raise ValueError(f"bin must be at least 1, and 1 unless pooling is none; got {self.bin}.")
        if self.positions != 0 and (self.pooling not in POSITIONAL or self.strands > 1):
            raise ValueError(
                f"positions must be 0 unless pooling is one of {', '.join(POSITIONAL)} on one strand; got"
                f" {self.positions}."
            )
        if self.positions is not None and self.positions < 0:
            raise ValueError(f"positions must be at least 0, or none for all; got {self.positions}.")
        if self.names and len(self.names) != self.n_outputs:
            raise ValueError(f"{self.n_outputs} outputs can't have {len(self.names)} names.")
        if self.strands not in (1, 2):
            raise ValueError(f"strands must be 1 or 2; got {self.strands}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}.")

    @property
    def along(self) -> bool:
        """Whether it answers positions, not the sequence."""
        return self.pooling == "none" or self.positions != 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeadConfig":
        """Build the config from plain values.

        Raises:
            ValueError: a key is unknown; the message names it.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"A head has no {', '.join(unknown)}; it has: {', '.join(known)}.")
        given: dict[str, Any] = {**values, "names": tuple(values.get("names", ()))}
        return cls(**given)


class SequenceHead(nn.Module):
    """Pool the hidden states, then one linear layer, or a tanh layer and a linear one.

    Args:
        d_output: width of the hidden states, both strands included.
        config: the rest.
    """

    def __init__(self, d_output: int, config: HeadConfig):
        super().__init__()
        self.config = config
        width = d_output // config.strands
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(width, width) if config.hidden else None
        self.score = nn.Linear(width, 1) if config.pooling == "attention" else None
        self.out = nn.Linear(width, config.n_outputs, bias=config.bias)
        for layer in (self.dense, self.score, self.out):
            if layer is not None:
                self.draw(layer)

    @staticmethod
    def draw(layer: nn.Linear) -> None:
        """Draw the weights of one of its layers anew."""
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return y_BC of hidden states, or y_BPC where several positions are answered; padding, told by `lengths_B`, is
        never looked at.

        Raises:
            ValueError: a row has fewer positions than the head answers.
        """
        if self.config.strands == 1:
            return self.answer(self.pool(x_BLD, self.config.pooling, lengths_B))
        forward_BLD, reverse_BLD = x_BLD.chunk(2, dim=-1)
        # The other strand begins where this one ends.
        mirrored = {"first": "last", "last": "first"}.get(self.config.pooling, self.config.pooling)
        forward_BC = self.answer(self.pool(forward_BLD, self.config.pooling, lengths_B))
        return (forward_BC + self.answer(self.pool(reverse_BLD.flip(-1), mirrored, lengths_B))) / 2

    def pool(self, x_BLD: Tensor, mode: str, lengths_B: Tensor | None) -> Tensor:
        """Return x_BD, or x_BPD of the bins or positions that are answered."""
        if self.config.positions != 0:
            return running(x_BLD, mode, self.config.positions, lengths_B)
        if mode == "none":
            width = self.config.bin
            return x_BLD if width == 1 else x_BLD.unflatten(1, (-1, width)).mean(2)
        if self.score is None:
            return pool(x_BLD, mode, lengths_B)
        score_BL = self.score(x_BLD).squeeze(-1).float()
        if lengths_B is not None:
            padding_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device) >= lengths_B[:, None]
            score_BL = score_BL.masked_fill(padding_BL, -torch.inf)
        return torch.einsum("bl,bld->bd", score_BL.softmax(-1).to(x_BLD.dtype), x_BLD)

    def answer(self, x_BD: Tensor) -> Tensor:
        """Return y_BC of pooled vectors."""
        x_BD = self.dropout(x_BD)
        if self.dense is not None:
            x_BD = self.dropout(torch.tanh(self.dense(x_BD)))
        return self.out(x_BD)
