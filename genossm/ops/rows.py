"""What recurrent ops share: which positions of a row are real, where its documents begin, and what fits together."""

import torch
from torch import Tensor


def real_positions(lengths_B: Tensor | None, length: int) -> Tensor | None:
    """Return real_BL, true at the first `lengths_B` positions of each row; None where all are real."""
    if lengths_B is None:
        return None
    return torch.arange(length, device=lengths_B.device) < lengths_B[:, None]


def whole_length(length: int) -> int:
    """Return the positions of a row as kernels of contiguous time want them, a multiple of 16.

    Then every row is aligned, and one compiled kernel, which loads 16 bytes at once, takes all lengths.
    """
    return -(-length // 16) * 16


def dropped_states(resets_BL: Tensor | None, lengths_B: Tensor | None, reverse: bool) -> Tensor | None:
    """Return drop_BL, true where the state that arrives at a position belongs to another document.

    From left to right that is where a document starts; from right to left it is the last position of each document
    but the row's last one, which the state from beyond the row enters.
    """
    if resets_BL is None:
        return None
    drop_BL = resets_BL.bool()
    real_BL = real_positions(lengths_B, resets_BL.shape[1])
    if real_BL is not None:
        # A document that starts in the padding is none.
        drop_BL = drop_BL & real_BL
    return torch.nn.functional.pad(drop_BL[:, 1:], (0, 1)) if reverse else drop_BL


def check_rows(lengths_B: Tensor | None, resets_BL: Tensor | None, batch: int, length: int) -> None:
    """Refuse lengths and resets of another shape.

    Raises:
        ValueError: they don't fit (batch, length), there is no position at all, or a length is beyond the row; that is
            looked up on the CPU alone, whose kernels trust it.
    """
    if length == 0:
        raise ValueError("The sequence has length 0; a scan needs at least one position.")
    if lengths_B is not None and lengths_B.shape != (batch,):
        raise ValueError(f"lengths must be (batch,) = ({batch},); got {tuple(lengths_B.shape)}.")
    if lengths_B is not None and lengths_B.device.type == "cpu" and not torch.compiler.is_compiling():
        given: list[int] = lengths_B.tolist()
        if not all(0 <= real <= length for real in given):
            raise ValueError(f"Each length must be in 0..{length}; got {given}.")
    if resets_BL is not None and resets_BL.shape != (batch, length):
        raise ValueError(f"resets must be (batch, length) = {(batch, length)}; got {tuple(resets_BL.shape)}.")


def check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuse tensors that don't fit together: a kernel would read beyond their memory.

    Args:
        tensors: each with the shape it must have; None is one that was not given.

    Raises:
        ValueError: a tensor has another shape.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, to fit the others; got {tuple(tensor.shape)}.")
