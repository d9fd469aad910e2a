"""The data path beside the published chain (pyfaidx and a character tokenizer in Python) and beside plain copies.

The chain's parts are those that HyenaDNA was published with: text of a window from pyfaidx, a character tokenizer on
transformers' slow `PreTrainedTokenizer`, called with padding and truncation to a length, `LongTensor`, two clones.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.data.transforms import NextToken
from genossm.data.windows import WindowBatches
from genossm.dna import alphabet
from genossm.dna.genome import Genome, encode
from genossm.dna.interval import Interval
from genossm.dna.tokenizer import CharTokenizer
from genossm.ops.backend import installed

logger = logging.getLogger(__name__)

_CONTIGS, _LINE = 4, 60


def comparisons(device: torch.device, bases: int = 100_000_000) -> list[Comparison]:
    """Return the comparisons of the data path; `device` is not used, since batches are made on the CPU."""
    del device
    return [
        Comparison(
            name=f"encode {bases:,} bp",
            build=lambda: encoding(bases),
            tokens=bases,
            memory=False,
            targets={"genossm": "3,000 ms"},
        ),
        *(
            Comparison(
                name=f"windows of {length:,}, batch {rows}",
                build=lambda length=length, rows=rows: windows(bases, length, rows),
                tokens=length * rows,
                memory=False,
                targets={"genossm": f"{target}, 1/4 of a copy's speed"},
            )
            for length, rows, target in ((1_024, 32, "100x"), (131_072, 4, "1,000x"), (1_000_000, 1, "1,000x"))
        ),
        Comparison(name="reverse complement of 131,072", build=strands, tokens=131_072, memory=False),
    ]


def write_genome(bases: int) -> Path:
    """Write a random genome of some contigs as FASTA, partly soft-masked; it is deleted with the process."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)
    path = Path(folder.name) / "genome.fa"
    rng = np.random.default_rng(0)
    with path.open("wb") as handle:
        for contig in range(_CONTIGS):
            letters = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, bases // _CONTIGS, dtype=np.uint8)]
            letters = letters | (np.arange(len(letters)) // 5000 % 2 * 0x20).astype(np.uint8)
            whole = letters[: len(letters) // _LINE * _LINE].reshape(-1, _LINE)
            lines = np.concatenate([whole, np.full((len(whole), 1), ord("\n"), np.uint8)], 1)
            handle.write(b">chr%d\n" % (contig + 1) + lines.tobytes())
    return path


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def encoding(bases: int) -> Mapping[str, Run]:
    """Compare encoding a FASTA with reading its bytes."""
    path = write_genome(bases)

    def ours() -> object:
        path.with_name(f"{path.name}.tokens").unlink(missing_ok=True)
        return encode(path)

    return {"read the bytes": path.read_bytes, "genossm": ours}


def windows(bases: int, length: int, rows: int) -> Mapping[str, Run]:
    """Compare batches of random windows; both strands for ours alone, as the published chain's loop takes longer."""
    from pyfaidx import Fasta

    path = write_genome(bases)
    fasta, genome = Fasta(str(path)), Genome(path)
    sizes = list(genome.contigs.items())
    intervals = [Interval(name, 0, size) for name, size in sizes]
    drawn = WindowBatches(genome=genome, intervals=intervals, objective=NextToken())
    rng = np.random.default_rng(1)
    number = iter(range(1 << 40))
    looked_up = _dictionary()

    def places() -> list[tuple[str, int]]:
        return [
            (name, int(rng.integers(size - length - 1)))
            for name, size in (sizes[i] for i in rng.integers(4, size=rows))
        ]

    def chain(tokenize: Callable[[str], list[int]]) -> Run:
        def run() -> object:
            texts = (str(fasta[name][start : start + length]) for name, start in places())
            ids_BL = torch.stack([torch.LongTensor(tokenize(text)) for text in texts])
            return ids_BL[:, :-1].clone(), ids_BL[:, 1:].clone()

        return run

    def copies() -> object:
        codes_BL = np.empty((rows, length), np.uint8)
        for row, (name, start) in zip(codes_BL, places(), strict=True):
            row[:] = genome.codes(name)[start : start + length]
        return codes_BL

    if installed("transformers"):
        baselines = {"published chain": chain(_slow_tokenizer(length)), "a dictionary": chain(looked_up)}
    else:
        logger.warning(
            "transformers is not installed: the baseline is a look-up a letter, which is several times faster."
        )
        baselines = {"a dictionary": chain(looked_up)}
    return {
        **baselines,
        "genossm": lambda: drawn.drawn(next(number), range(rows), rows, length),
        "copy of the bytes": copies,
    }


def _dictionary() -> Callable[[str], list[int]]:
    """Return the least that a tokenizer in Python can do: one look-up a letter, and the id that ends a text."""
    vocabulary = {letter: alphabet.A + index for index, letter in enumerate("ACGTN")}
    return lambda text: [*(vocabulary.get(letter, 6) for letter in list(text.upper())), 1]


def _slow_tokenizer(length: int) -> Callable[[str], list[int]]:
    """Return a character tokenizer on transformers' class for tokenizers in Python, called as the loader calls it."""
    from transformers import PreTrainedTokenizer

    ids = {word: index for index, word in enumerate(CharTokenizer.vocabulary)}

    class Letters(PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return len(ids)

        def get_vocab(self) -> dict[str, int]:
            return dict(ids)

        def _tokenize(self, text: str, **unused: object) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ids.get(token, CharTokenizer.unknown_id)

        def _convert_id_to_token(self, index: int) -> str:
            return CharTokenizer.vocabulary[index]

        def build_inputs_with_special_tokens(
            self, token_ids_0: list[int], token_ids_1: list[int] | None = None
        ) -> list[int]:
            return [*token_ids_0, CharTokenizer.after[0]]

    names = dict.fromkeys(("sep_token", "eos_token"), "[SEP]")
    names |= {"bos_token": "[BOS]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    names |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    letters = Letters(**names, model_max_length=length + 2, padding_side="left")
    return lambda text: letters(text, padding="max_length", max_length=length, truncation=True)["input_ids"]


def strands() -> Mapping[str, Run]:
    """Compare a reverse complement with a copy and with translated text."""
    codes_L = alphabet.from_text("".join(np.random.default_rng(0).choice(list("ACGT"), 131_072)))
    text = alphabet.to_text(codes_L)
    return {
        "text": lambda: alphabet.reverse_complement_text(text),
        "genossm": lambda: alphabet.reverse_complement(codes_L),
        "copy": codes_L.copy,
    }
