"""Letters of DNA and what may stand for them.

One byte a base everywhere: the published character ids (A 7, C 8, G 9, T 10, N 11), with bit 7 set where the
source letter was lower case (soft-masked: a repeat). Everything that reads or complements DNA goes through the
tables of this file.
"""

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]

A, C, G, T, N = 7, 8, 9, 10, 11
PAD = 4
SOFT_MASK = 0x80
"""Bit that marks a soft-masked (lower-case) base in a stored byte."""
INVALID = 0xFF
AMBIGUOUS = 12
"""Marks an IUPAC letter other than N while a file is encoded; stored as N."""

IUPAC_AMBIGUOUS = "RYSWKMBDHVX"
_COMPLEMENT_LETTERS = str.maketrans("ACGTUNRYSWKMBDHVXacgtunryswkmbdhvx", "TGCAANYRSWMKVHDBXtgcaanyrswmkvhdbx")


def _encode_table() -> bytes:
    table = bytearray([INVALID]) * 256
    ids = {"A": A, "C": C, "G": G, "T": T, "U": T, "N": N} | dict.fromkeys(IUPAC_AMBIGUOUS, AMBIGUOUS)
    for letter, code in ids.items():
        table[ord(letter)] = code
        table[ord(letter.lower())] = code | SOFT_MASK
    return bytes(table)


ENCODE = _encode_table()
"""ASCII letter -> stored byte, for `bytes.translate`; letters that are no nucleotide give `INVALID`."""

DECODE = bytes(
    b"ACGTN"[(code & 0x7F) - A] | (0x20 if code & SOFT_MASK else 0) if A <= (code & 0x7F) <= N else ord("?")
    for code in range(256)
)
"""Stored byte -> ASCII letter, for `bytes.translate`."""


def complement(codes: Bytes, holds_n: bool = True) -> Bytes:
    """Complement stored bytes, base by base; the soft-mask bit stays with its base.

    A + T = C + G = 17, so the complement is a subtraction, at the speed of a copy, which leaves the soft-mask bit where
    it was: 17 - (128 + id) is 128 + (17 - id) in bytes. N stays N.

    Args:
        codes: stored bytes, of any shape: A, C, G, T and N, soft-masked or not.
        holds_n: whether there may be N; not looking for it halves the time.
    """
    flipped: Bytes = np.uint8(A + T) - codes
    if holds_n:
        is_n = (codes & np.uint8(0x7F)) == N
        if is_n.any():
            flipped[is_n] = codes[is_n]
    return flipped


def reverse_complement(codes: Bytes, holds_n: bool = True) -> Bytes:
    """Return the other strand, read 5' to 3', along the last axis of an array of stored bytes; see `complement`."""
    # torch turns bytes round seven times as fast as numpy, whose reversed views go byte by byte.
    return torch.flip(torch.from_numpy(complement(codes, holds_n)), [-1]).numpy()


def reverse_complement_text(sequence: str) -> str:
    """Return the other strand of a text, IUPAC letters and case included."""
    return sequence.translate(_COMPLEMENT_LETTERS)[::-1]


def from_text(sequence: str) -> Bytes:
    """Encode a text of nucleotides into stored bytes.

    Raises:
        ValueError: a letter is no IUPAC nucleotide; the message names it and its 0-based position.
    """
    raw = sequence.encode("ascii", "replace")
    codes = np.frombuffer(raw.translate(ENCODE), dtype=np.uint8)
    bad = np.flatnonzero(codes == INVALID)
    if bad.size:
        raise ValueError(
            f"{sequence[bad[0]]!r} at position {bad[0]} is no nucleotide; allowed are A, C, G, T, U, N and the IUPAC"
            f" letters {IUPAC_AMBIGUOUS}, in either case."
        )
    return ambiguous_to_n(codes)


def ambiguous_to_n(codes: Bytes) -> Bytes:
    """Turn IUPAC letters other than N into N, keeping the soft-mask bit."""
    return np.where((codes & 0x7F) == AMBIGUOUS, (codes & np.uint8(SOFT_MASK)) | np.uint8(N), codes)


def to_text(codes: Bytes) -> str:
    """Decode stored bytes into letters, soft-masked ones in lower case."""
    return codes.tobytes().translate(DECODE).decode("ascii")
