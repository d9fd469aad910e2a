"""Reading windows of a genome into a batch: one pass that copies, drops case, turns strands and looks for N."""

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8

from genossm.ops.backend import log_slower, runs

_CPU = torch.device("cpu")
PAIR_SUM, N = np.uint8(17), np.uint8(11)
"""What a base and its complement sum to, and the byte of N: the published ids are A 7, C 8, G 9, T 10, N 11."""
SOFT_MASK = np.uint8(0x80)
"""The bit of a lower-case base."""

# Not `NDArray[Any]`: it is no class from numpy 2.5 on, where jaxtyping needs one.
Array = np.ndarray


def strand_copy_ref(
    store_S: UInt8[Array, "S"],
    starts_B: Int64[Array, "B"],
    turned_B: Bool[Array, "B"],
    upper: bool,
    out_BL: UInt8[Array, "B L"],
    rows_R: Int64[Array, "R"],
) -> bool:
    """Copy row by row, then complement and turn round: the truth that `strand_copy` is held to."""
    for row in rows_R:
        codes_L = store_S[starts_B[row] : starts_B[row] + out_BL.shape[1]]
        if upper:
            codes_L = codes_L & ~SOFT_MASK
        if turned_B[row]:
            complement_L = np.where((codes_L & ~SOFT_MASK) == N, codes_L, PAIR_SUM - codes_L)
            codes_L = complement_L[::-1]
        out_BL[row] = codes_L
    return bool(((out_BL[rows_R] & ~SOFT_MASK) == N).any())


def strand_copy(
    store_S: UInt8[Array, "S"],
    starts_B: Int64[Array, "B"],
    turned_B: Bool[Array, "B"],
    upper: bool,
    out_BL: UInt8[Array, "B L"],
    rows_R: Int64[Array, "R"],
) -> bool:
    """Fill rows with windows of a store of bases, each on the strand asked for.

    Args:
        store_S: stored bytes (A 7, C 8, G 9, T 10, N 11; bit 7 set where soft-masked).
        starts_B: where each row's window begins in the store, 0-based.
        turned_B: whether a row is read on the other strand, 5' to 3'.
        upper: clear the soft-mask bits.
        out_BL: where the windows are written.
        rows_R: the rows that are filled; the others stay as they are.

    Returns:
        Whether there is an N in any of those rows.

    Raises:
        ValueError: a window reaches beyond the store.
    """
    last = len(store_S) - out_BL.shape[1]
    starts_R = starts_B[rows_R]
    if len(starts_R) and (starts_R.min() < 0 or starts_R.max() > last):
        raise ValueError(f"A window of {out_BL.shape[1]} bases reaches beyond the {len(store_S)} that there are.")
    # What `use_backend` asks for is a model's business: a loader may run beside one on a GPU.
    refusal = runs("numba", _CPU)
    if refusal is not None:
        log_slower("strand_copy", "reference", refusal)
        return strand_copy_ref(store_S, starts_B, turned_B, upper, out_BL, rows_R)
    from genossm.ops.kernels import strand_copy_numba

    found = np.zeros(1, np.uint8)
    kept = ~SOFT_MASK if upper else np.uint8(0xFF)
    strand_copy_numba.copy(store_S, starts_B, turned_B, kept, out_BL, rows_R, found)
    return bool(found[0])
