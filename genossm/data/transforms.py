"""What happens to a batch of ids between the genome and the model: strands, masking, weights. All seeded by number."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.tokenizer import CharTokenizer

IGNORED = 255
"""Target of a position that does not count, as uint8."""


@dataclass(frozen=True, kw_only=True)
class MaskTokens:
    """Masked-language-model corruption, as published (Devlin et al. 2019; Caduceus, appendix C), its traps mended.

    Of the bases A, C, G and T of each row `fraction` is chosen; of those `mask` become `[MASK]`, `random` a base
    drawn from the four (the published code draws from all ids, special ones included), the rest stays. N and special
    tokens are never chosen; a row with bases gets at least one target, a row without any gets none.

    Raises:
        ValueError: a share is outside [0, 1], or `mask` + `random` exceeds 1.
    """

    fraction: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    train_fraction: float | None = None
    """Share that is chosen in training, where it differs: more targets a batch (Wettig et al. 2023); None: the same."""

    def __post_init__(self) -> None:
        for name in ("fraction", "train_fraction"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {share}.")
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1:
            raise ValueError(f"mask and random must be shares that sum to at most 1; got {self.mask}, {self.random}.")

    def in_training(self) -> "MaskTokens":
        """Return what corrupts training batches."""
        return replace(self, fraction=self.train_fraction or self.fraction)

    def __call__(self, ids_BL: Bytes, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
        """Return corrupted ids and targets (`IGNORED` where nothing is asked)."""
        base_BL = (ids_BL >= alphabet.A) & (ids_BL <= alphabet.T)
        draw_BL = rng.random(ids_BL.shape, dtype=np.float32)
        chosen_BL = base_BL & (draw_BL < self.fraction)
        empty_B = base_BL.any(1) & ~chosen_BL.any(1)
        if empty_B.any():
            ranked_BL = np.where(base_BL, draw_BL, 2.0)
            chosen_BL[empty_B, ranked_BL[empty_B].argmin(1)] = True
        targets_BL = np.where(chosen_BL, ids_BL, np.uint8(IGNORED))
        fate_BL = rng.random(ids_BL.shape, dtype=np.float32)
        drawn_BL = rng.integers(alphabet.A, alphabet.T + 1, ids_BL.shape, dtype=np.uint8)
        corrupted_BL = np.where(chosen_BL & (fate_BL < self.mask), np.uint8(CharTokenizer.mask_id), ids_BL)
        swapped_BL = chosen_BL & (fate_BL >= self.mask) & (fate_BL < self.mask + self.random)
        return np.where(swapped_BL, drawn_BL, corrupted_BL), targets_BL


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Causal targets: the id that follows; N and special tokens are never a target."""

    def in_training(self) -> "NextToken":
        """Return what makes the targets of training batches: itself."""
        return self

    def __call__(self, ids_BL: Bytes, rng: np.random.Generator, only_bases: bool = False) -> tuple[Bytes, Bytes]:
        """Return ids without the last and the targets of each; where all are bases, both are views of the same ids.

        `only_bases` says that all are, which is else looked for.
        """
        following_BL = ids_BL[:, 1:]
        if not only_bases and ids_BL.size and (ids_BL.max() > alphabet.T or ids_BL.min() < alphabet.A):
            # Ids of bases are contiguous, so one subtraction that wraps around tells them from all others.
            other_BL = (following_BL - np.uint8(alphabet.A)) > alphabet.T - alphabet.A
            following_BL = np.where(other_BL, np.uint8(IGNORED), following_BL)
        return ids_BL[:, :-1], following_BL


Objective = MaskTokens | NextToken


def soft_mask_weights(codes_BL: Bytes, weight: float) -> npt.NDArray[np.float32]:
    """Return a loss weight for each stored byte: `weight` where it is soft-masked, else 1 (Benegas et al. 2023)."""
    return np.where(codes_BL >= alphabet.SOFT_MASK, np.float32(weight), np.float32(1.0))
