"""Tokenizers: text of DNA to ids and back. The default gives one token a base, with the published ids."""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

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
    before: tuple[int, ...] = ()
    """Ids that the published tokenizer puts before a text."""
    after: tuple[int, ...] = ()
    """Ids that it puts after a text, and between two."""
    padding_side: str = "right"
    """Where the published tokenizer pads; everything of ours pads on the right."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self.vocabulary)

    @abstractmethod
    def encode(self, sequence: str, special: bool = False) -> npt.NDArray[np.integer]:
        """Return the ids of a text; `special` adds what the published tokenizer adds around it."""

    def encode_pair(self, first: str, second: str) -> npt.NDArray[np.integer]:
        """Return the ids of two texts with what the published tokenizer puts around and between them.

        Raises:
            ValueError: it has no id that ends a text.
        """
        if not self.after:
            raise ValueError(f"Tokenizer {self.name!r} takes one text: it has no id that ends one.")
        parts = (self.before, self.encode(first), self.after, self.encode(second), self.after)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    def encode_batch(
        self,
        texts: Sequence[str],
        special: bool = True,
        max_length: int | None = None,
        pad_to: int | None = None,
        side: str | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return padded ids_BL of texts and mask_BL, true at what is not padding.

        Args:
            texts: one a row.
            special: add what the published tokenizer adds around each.
            max_length: cut the end of longer texts; what is added stays.
            pad_to: columns; None takes the longest row's.
            side: where to pad, "left" or "right"; None is the published side.

        Raises:
            ValueError: `side` is neither, or a row is longer than `pad_to`.
        """
        side = self.padding_side if side is None else side
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right; got {side!r}.")
        before, after = (self.before, self.after) if special else ((), ())
        room = None if max_length is None else max(max_length - len(before) - len(after), 0)
        rows = [[*before, *self.encode(text)[:room].tolist(), *after] for text in texts]
        longest = max((len(row) for row in rows), default=0)
        width = longest if pad_to is None else pad_to
        if longest > width:
            raise ValueError(f"A row has {longest} tokens, more than pad_to={width}; give max_length as well.")
        ids_BL = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask_BL = np.zeros((len(rows), width), dtype=np.bool_)
        for index, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids_BL[index, where], mask_BL[index, where] = row, True
        return ids_BL, mask_BL

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
    after = (sep_id,)
    padding_side = "left"
    _special = re.compile(r"(\[(?:CLS|SEP|BOS|MASK|PAD|UNK)\])")
    _dropped = frozenset((0, 1, 2, 3, 4, 6))

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
        """Return uint8 ids; letters outside ACGTN are `[UNK]`, names of special ids are those ids."""
        raw = self._translate(sequence)
        return np.frombuffer(bytes(self.before) + raw + bytes(self.after) if special else raw, dtype=np.uint8)

    def _translate(self, sequence: str) -> bytes:
        if "[" not in sequence:
            return sequence.encode("ascii", "replace").translate(self._table)
        pieces = self._special.split(sequence)
        ids = (bytes([self.vocabulary.index(piece.strip())]) for piece in pieces[1::2])
        texts = (piece.encode("ascii", "replace").translate(self._table) for piece in pieces[::2])
        return b"".join(text + name for text, name in itertools.zip_longest(texts, ids, fillvalue=b""))

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the letters of ids; ids from 12 on, which only pad the vocabulary, are an error."""
        return "".join(self.vocabulary[i] for i in ids if special or i not in self._dropped)

    def from_codes(self, codes: Bytes) -> Bytes:
        """Return uint8 ids of stored bytes, at the speed of a copy."""
        ids: Bytes = codes & np.uint8(0x7F)
        if self.lower_case == "unknown":
            ids[codes >= alphabet.SOFT_MASK] = self.unknown_id
        return ids


class HyenaDNATokenizer(CharTokenizer):
    """The published HyenaDNA tokenizer: that of `char`, but lower-case letters are `[UNK]`."""

    name = "hyenadna"

    def __init__(self) -> None:
        super().__init__("unknown")


class HyenaDNAStandaloneTokenizer(HyenaDNATokenizer):
    """That of HyenaDNA's stand-alone code and of Caduceus' training code: `[CLS]` stands before a text."""

    name = "hyenadna_standalone"
    before = (CharTokenizer.cls_id,)
    # It takes the spaces before a mask for part of it.
    _special = re.compile(r"(\[(?:CLS|SEP|BOS|PAD|UNK)\]|\s*\[MASK\])")


class PlantCaduceusTokenizer(Tokenizer):
    """One token a base, lower case, with the eight ids of PlantCaduceus; N and all other letters are `[UNK]`."""

    name = "plantcaduceus"
    vocabulary = ("[PAD]", "[MASK]", "[UNK]", "a", "c", "g", "t", "[unused]")
    pad_id, mask_id, unknown_id = 0, 1, 2
    base_ids = (3, 4, 5, 6)
    complement_map = (0, 1, 2, 6, 5, 4, 3, 7)
    """Id of the complementary base, by id."""

    def encode(self, sequence: str, special: bool = False) -> npt.NDArray[np.integer]:
        """Return uint8 ids; nothing is added around a text, and white space is dropped."""
        letters = "".join(sequence.lower().split())
        return np.array(["acgt".find(c) + 3 if c in "acgt" else 2 for c in letters], dtype=np.uint8)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the letters of ids."""
        return "".join(self.vocabulary[i] for i in ids if special or i in self.base_ids)

    def from_codes(self, codes: Bytes) -> npt.NDArray[np.integer]:
        """Return uint8 ids of stored bytes."""
        bases = codes & np.uint8(0x7F)
        return np.where((bases >= alphabet.A) & (bases <= alphabet.T), bases - 4, 2).astype(np.uint8)


class KmerTokenizer(Tokenizer):
    """Six bases a token where they fit, one elsewhere: the tokenizer of the Nucleotide Transformer, first generation.

    Reading goes on from the left: six letters of ACGT are one token; an N, or what is left before one, stands alone. A
    run of other letters is one `<unk>`; white space is dropped. `<cls>` stands before a text.

    Args:
        strict: refuse what is no nucleotide, as the authors' own code does, instead of giving `<unk>`.
    """

    name = "nt_v1"
    extra: tuple[str, ...] = ()
    bases_per_token = 6
    unknown_id, pad_id, mask_id, cls_id = 0, 1, 2, 3
    before = (cls_id,)

    def __init__(self, strict: bool = False):
        self.strict = strict
        specials = ("<unk>", "<pad>", "<mask>", "<cls>", *self.extra)
        kmers = ("".join(letters) for letters in itertools.product("ATCG", repeat=6))
        self.vocabulary = (*specials, *kmers, *"ATCGN")
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        self._specials = frozenset(specials)
        self._pattern = re.compile(f"({'|'.join(specials)}|[ACGT]{{6}}|[ACGTN])")

    def tokenize(self, sequence: str) -> list[str]:
        """Return the tokens of a text, unknown ones as they stand in it."""
        pieces = self._pattern.split(sequence)
        return [token for piece in pieces for token in ([piece] if piece in self._ids else piece.split())]

    def encode(self, sequence: str, special: bool = False) -> npt.NDArray[np.integer]:
        """Return int64 ids.

        Raises:
            KeyError: `strict`, and there is a letter that is no nucleotide.
        """
        if self.strict:
            odd = re.sub("<mask>|[ACGTN]", "", sequence)
            if odd:
                raise KeyError(f"{odd[0]!r} is no nucleotide; this tokenizer knows A, C, G, T, N and <mask>.")
        ids = [self._ids.get(token, self.unknown_id) for token in self.tokenize(sequence)]
        return np.array([*self.before, *ids, *self.after] if special else ids, dtype=np.int64)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the tokens of ids with a space between them."""
        tokens = (self.vocabulary[i] for i in ids)
        return " ".join(token for token in tokens if special or token not in self._specials)

    def from_codes(self, codes: Bytes) -> npt.NDArray[np.integer]:
        """Return int64 ids of one row of stored bytes; soft-masked bases are read as the others."""
        letters: Any = codes.astype(np.uint8) & np.uint8(0x7F)
        return self.encode(letters.tobytes().translate(alphabet.DECODE).decode("ascii").upper())


class KmerTokenizerV2(KmerTokenizer):
    """That of the second generation, which has two ids more."""

    name = "nt_v2"
    extra = ("<eos>", "<bos>")


class ProteinTokenizer(KmerTokenizer):
    """That of ESM-2: one token an amino acid, `<cls>` before a text and `<eos>` after it.

    A run of anything else, lower-case letters among them, is one `<unk>`; white space is dropped.
    """

    name = "esm2"
    vocabulary = (
        *("<cls>", "<pad>", "<eos>", "<unk>"),
        *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
        *("<null_1>", "<mask>"),
    )
    bases_per_token = 1
    cls_id, pad_id, eos_id, unknown_id, mask_id = 0, 1, 2, 3, 32
    before, after = (cls_id,), (eos_id,)

    def __init__(self) -> None:
        self.strict = False
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        self._specials = frozenset(self.vocabulary) - {"<null_1>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-"}
        self._pattern = re.compile(f"({'|'.join(map(re.escape, self.vocabulary))})")

    def from_codes(self, codes: Bytes) -> npt.NDArray[np.integer]:
        """Refuse stored bases.

        Raises:
            ValueError: always.
        """
        raise ValueError("This model reads proteins (tokenizer esm2); it can't run over a genome. Give it amino acids.")


class ByteTokenizer(Tokenizer):
    """One token a byte of text (UTF-8), as Evo reads it; id 0 ends and starts texts, id 1 pads."""

    name = "evo"
    vocabulary = tuple(chr(max(index, 32)) for index in range(512))
    end_id, pad_id = 0, 1
    mask_id = unknown_id = -1
    """There are no such ids."""
    before = (end_id,)

    def encode(self, sequence: str, special: bool = False) -> npt.NDArray[np.integer]:
        """Return uint8 ids; `special` puts id 0 before them, as scoring does."""
        raw = sequence.encode()
        return np.frombuffer(bytes(self.before) + raw if special else raw, dtype=np.uint8)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of ids, one letter each; ids below 32 are shown as spaces."""
        return "".join(self.vocabulary[i] for i in ids)

    def from_codes(self, codes: Bytes) -> npt.NDArray[np.integer]:
        """Return uint8 ids of stored bytes; soft-masked bases are read as the others."""
        letters = np.frombuffer(alphabet.DECODE, dtype=np.uint8)
        return letters[codes & np.uint8(0x7F)]


def tokenizer_named(name: str) -> Tokenizer:
    """Return the tokenizer of this file that has a name, as config.json gives it.

    Raises:
        ValueError: there is none of that name.
    """
    kinds = {
        kind.name: kind
        for kind in globals().values()
        if isinstance(kind, type) and issubclass(kind, Tokenizer) and hasattr(kind, "name")
    }
    if name not in kinds:
        raise ValueError(f"No tokenizer is named {name!r}; there are: {', '.join(sorted(kinds))}.")
    return kinds[name]()
