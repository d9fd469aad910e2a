"""Everything about the two strands: complements of ids, rows read backwards, both strands' states side by side.

A model that is equivariant to the reverse complement runs both strands, each in its own reading order, as rows of one
batch, first all given strands, then all others. Outside it shows them side by side, as published (Schiff et al. 2024,
Caduceus, section 4): the given strand's D channels, then the other strand's in reverse order of time and of channels,
so that both halves speak of the same position and the reverse complement of a sequence gives the same values reversed
in time and in channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHAR_COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
"""The complement of each id of the char tokenizer: A with T, C with G, all else with itself."""


def check_complement(complement: Sequence[int], vocab_size: int) -> None:
    """Refuse a map that is not its own inverse: a strand would not come back to itself.

    Raises:
        ValueError: it has an id outside the vocabulary, the wrong length, or a pair that doesn't point back.
    """
    if len(complement) > vocab_size:
        raise ValueError(f"complement_map has {len(complement)} ids, the vocabulary {vocab_size}.")
    for one, other in enumerate(complement):
        if not 0 <= other < len(complement) or complement[other] != one:
            raise ValueError(
                f"complement_map must be its own inverse; id {one} maps to {other}, which doesn't map back. Give one id"
                " a token, e.g. 10 at A=7 and 7 at T=10."
            )


def complement_tensor(complement: Sequence[int], rows: int) -> Tensor:
    """Return the complement of each of `rows` ids; those above the map are their own."""
    return torch.tensor([*complement, *range(len(complement), rows)])


def reversed_rows(x_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Return rows (B, L, …) whose real part is read backwards; what stands behind it stays."""
    if lengths_B is None:
        return x_BL.flip(1)
    step_L = torch.arange(x_BL.shape[1], device=x_BL.device)
    ends_B1 = lengths_B.to(x_BL.device)[:, None]
    index_BL = torch.where(step_L < ends_B1, ends_B1 - 1 - step_L, step_L)
    return x_BL.gather(1, index_BL.reshape(*index_BL.shape, *[1] * (x_BL.ndim - 2)).expand(x_BL.shape))


def reverse_complement(ids_BL: Tensor, complement_V: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Return the other strand of each row, padding left where it is."""
    return complement_V[reversed_rows(ids_BL, lengths_B).int()].to(ids_BL.dtype)


def reversed_resets(resets_BL: Tensor | None, lengths_B: Tensor | None) -> Tensor | None:
    """Return where documents start on the other strand: next to the border that they started at here."""
    if resets_BL is None:
        return None
    starts_BL = F.pad(resets_BL[:, 1:], (0, 1))
    if lengths_B is not None:
        # The padding starts no document, and the row's first position always does.
        starts_BL = starts_BL & (torch.arange(1, resets_BL.shape[1] + 1, device=resets_BL.device) < lengths_B[:, None])
    turned_BL = reversed_rows(starts_BL, lengths_B)
    turned_BL[:, 0] = True
    return turned_BL


def both_strands(
    ids_BL: Tensor, complement_V: Tensor, lengths_B: Tensor | None, resets_BL: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ids, lengths and resets of a batch of the given strands and then the others."""
    ids_SL = torch.cat([ids_BL, reverse_complement(ids_BL, complement_V, lengths_B)])
    return ids_SL, *both_rows(lengths_B, resets_BL)


def both_rows(lengths_B: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return lengths and resets of a batch of the given strands and then the others."""
    turned_BL = reversed_resets(resets_BL, lengths_B)
    resets_SL = None if resets_BL is None or turned_BL is None else torch.cat([resets_BL, turned_BL])
    return None if lengths_B is None else torch.cat([lengths_B, lengths_B]), resets_SL


def join_strands(x_SLD: Tensor, lengths_B: Tensor | None = None, swapped: bool = False) -> Tensor:
    """Put both strands' states side by side; `swapped` puts the other strand first."""
    given_BLD, other_BLD = x_SLD.chunk(2)
    other_BLD = reversed_rows(other_BLD, lengths_B).flip(-1)
    return torch.cat([other_BLD, given_BLD] if swapped else [given_BLD, other_BLD], dim=-1)


def split_strands(x_BLD2: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Undo `join_strands`: both strands' states as rows, each in its own order."""
    given_BLD, other_BLD = x_BLD2.chunk(2, dim=-1)
    return torch.cat([given_BLD, reversed_rows(other_BLD.flip(-1), lengths_B)])


class StrandNorm(nn.Module):
    """One norm over both halves of joined states, each in its own order of channels."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x_BLD2: Tensor) -> Tensor:
        given, other = x_BLD2.chunk(2, dim=-1)
        return torch.cat([self.norm(given), with_turned_weights(self.norm, other)], dim=-1)


def with_turned_weights(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm to channels in reverse order, without turning them: its weights turn instead."""
    turned = {name: parameter.flip(0) for name, parameter in norm.named_parameters()}
    return torch.func.functional_call(norm, turned, (x,))


def strand_logits(x_BLD2: Tensor, weight_VD: Tensor, complement_V: Tensor) -> Tensor:
    """Return a W^T + b W[complement]^T of joined states (a, b reversed in channels): the small side is turned."""
    both_VD2 = torch.cat([weight_VD, weight_VD[complement_V].flip(1)], dim=1)
    return F.linear(x_BLD2, both_VD2)
