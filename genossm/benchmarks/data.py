"""The data path beside the published chain (pyfaidx and a character tokenizer in Python) and beside plain copies."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.data.transforms import NextToken
from genossm.data.windows import WindowBatches
from genossm.dna import alphabet
from genossm.dna.genome import Genome, encode
from genossm.dna.interval import Interval

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
    vocabulary = {letter: alphabet.A + index for index, letter in enumerate("ACGTN")}

    def places() -> list[tuple[str, int]]:
        return [
            (name, int(rng.integers(size - length - 1)))
            for name, size in (sizes[i] for i in rng.integers(4, size=rows))
        ]

    def published() -> object:
        batch: list[torch.Tensor] = []
        for name, start in places():
            text = str(fasta[name][start : start + length])
            tokens = list(text.upper())
            ids = [vocabulary.get(token, 6) for token in tokens]
            batch.append(torch.LongTensor([*ids, 1]))
        ids_BL = torch.stack(batch)
        return ids_BL[:, :-1].clone(), ids_BL[:, 1:].clone()

    def copies() -> object:
        codes_BL = np.empty((rows, length), np.uint8)
        for row, (name, start) in zip(codes_BL, places(), strict=True):
            row[:] = genome.codes(name)[start : start + length]
        return codes_BL

    return {
        "pyfaidx and a Python tokenizer": published,
        "genossm": lambda: drawn.drawn(next(number), range(rows), rows, length),
        "copy of the bytes": copies,
    }


def strands() -> Mapping[str, Run]:
    """Compare a reverse complement with a copy and with translated text."""
    codes_L = alphabet.from_text("".join(np.random.default_rng(0).choice(list("ACGT"), 131_072)))
    text = alphabet.to_text(codes_L)
    return {
        "text": lambda: alphabet.reverse_complement_text(text),
        "genossm": lambda: alphabet.reverse_complement(codes_L),
        "copy": codes_L.copy,
    }
