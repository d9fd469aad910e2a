"""Tokenizers: text of DNA to ids and back. The default gives one token a base, with the published ids."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes

LOWER_CASE = ("upper", "unknown")


class Tokenizer(ABC):
    """What every tokenizer offers: ids of a text, the text of ids, and the ids with a meaning of their own."""

    name: ClassVar[str]
    vocabulary: Sequence[str]
    pad_id: int
    mask_id: int
    unknown_id: int
    bases_per_token: int = 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.vocabulary)

    @abstractmethod
    def encode(self, sequence: str, special: bool = False) -> npt.NDArray[np.integer]:
        """Return the ids of a text; `special` adds what the published tokenizer adds around it."""

    @abstractmethod
    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of ids; special tokens are shown where `special` is set and dropped otherwise."""

    @abstractmethod
    def from_codes(self, codes: Bytes) -> npt.NDArray[np.integer]:
        """Return the ids of stored bytes (`dna.alphabet`): what the loaders call."""


class CharTokenizer(Tokenizer):
    """One token a base, with the ids that HyenaDNA and Caduceus published.

    `[CLS]`0 `[SEP]`1 `[BOS]`2 `[MASK]`3 `[PAD]`4 `[RESERVED]`5 `[UNK]`6 A7 C8 G9 T10 N11.

    Args:
        lower_case: "upper" reads soft-masked letters as their upper-case base (Caduceus); "unknown" gives them
            `[UNK]`, as the published HyenaDNA tokenizer does.

    Raises:
        ValueError: `lower_case` is neither.
    """

    name = "char"
    vocabulary = (
        "[CLS]",
        "[SEP]",
        "[BOS]",
        "[MASK]",
        "[PAD]",
        "[RESERVED]",
        "[UNK]",
        "A",
        "C",
        "G",
        "T",
        "N",
    )
    cls_id, sep_id, bos_id, mask_id, pad_id, unknown_id = 0, 1, 2, 3, 4, 6
    base_ids = (alphabet.A, alphabet.C, alphabet.G, alphabet.T)
    n_id = alphabet.N
    complement_map = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
    """Id of the complementary base, by id."""

    def __init__(self, lower_case: str = "upper"):
        if lower_case not in LOWER_CASE:
            raise ValueError(f"lower_case must be one of {', '.join(LOWER_CASE)}; got {lower_case!r}.")
        self.lower_case = lower_case
        table = bytearray([self.unknown_id]) * 256
        for index, letter in enumerate("ACGTN"):
            table[ord(letter)] = alphabet.A + index
            if lower_case == "upper":
                table[ord(letter.lower())] = alphabet.A + index
        self._table = bytes(table)

    def encode(self, sequence: str, special: bool = False) -> Bytes:
        """Return uint8 ids; letters outside ACGTN are `[UNK]`; `special` appends `[SEP]`."""
        raw = sequence.encode("ascii", "replace").translate(self._table)
        return np.frombuffer(raw + bytes([self.sep_id]) if special else raw, dtype=np.uint8)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the letters of ids; ids from 12 on, which only pad the vocabulary, are an error."""
        return "".join(self.vocabulary[i] for i in ids if special or i >= self.unknown_id)

    def from_codes(self, codes: Bytes) -> Bytes:
        """Return uint8 ids of stored bytes, at the speed of a copy."""
        ids: Bytes = codes & np.uint8(0x7F)
        if self.lower_case == "unknown":
            ids[codes >= alphabet.SOFT_MASK] = self.unknown_id
        return ids
