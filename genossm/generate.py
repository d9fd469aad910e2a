"""`genossm generate`: prompts to sequences, the prompt in one go, then one step a base."""

import logging
import time
from collections import defaultdict
from collections.abc import Generator as Steps
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.composition import divergence, gc_content, kmer_counts, reading_frames
from genossm.dna.genome import Genome
from genossm.files import write_atomically
from genossm.inference import Opened, extend, opened, select_rows
from genossm.jobs import Progress
from genossm.models.base import Backbone

logger = logging.getLogger(__name__)

_KMER = 4
_MOST_WINDOWS = 64
"""Windows of the genome that stand beside the generated sequences."""


@dataclass(frozen=True)
class Sampling:
    """How the next base is drawn.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest base always."""
    top_k: int = 0
    """Keep the k likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest that together reach this probability."""
    min_p: float = 0.0
    """Keep those at least this fraction as likely as the likeliest."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (always the likeliest) or above; got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or a number of bases; got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1]; got {self.min_p}.")

    def __str__(self) -> str:
        """Return what is in force, as a FASTA's header says it."""
        chosen = [f"temperature={self.temperature:g}"]
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if value != option.default:
                chosen.append(f"{option.name}={value:g}")
        return " ".join(chosen)

    def draw(self, logits_BK: Tensor, uniform_B: Tensor) -> Tensor:
        """Return the drawn column of each row.

        Args:
            logits_BK: logits of the tokens that are allowed.
            uniform_B: a number in [0, 1) for each row: equal numbers and logits give equal draws.
        """
        if self.temperature == 0:
            return logits_BK.argmax(-1)
        p_BK, order_BK = torch.sort(
            (logits_BK.double() / self.temperature).softmax(-1), dim=-1, descending=True, stable=True
        )
        kept_BK = (p_BK.cumsum(-1) - p_BK < self.top_p) & (p_BK >= self.min_p * p_BK[:, :1])
        if self.top_k:
            kept_BK[:, self.top_k :] = False
        # The likeliest always stays, whatever rounding does.
        kept_BK[:, 0] = True
        edges_BK = (p_BK * kept_BK).cumsum(-1)
        picked_B1 = (edges_BK <= uniform_B[:, None].double() * edges_BK[:, -1:]).sum(-1, keepdim=True)
        return order_BK.gather(-1, picked_B1.clamp(max=logits_BK.shape[1] - 1))[:, 0]


@dataclass
class Generated:
    """What `generate` gives back.

    Attributes:
        sequences: the generated bases, `n` for each prompt in turn.
        names: one each.
        path: the FASTA, or None.
        seconds: how long it took.
        statistics: GC content, k-mer divergence and reading frames, beside those of the genome.
    """

    sequences: list[str]
    names: list[str]
    path: Path | None
    seconds: float
    statistics: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the outcome for the command line."""
        shown: dict[str, Any] = {"out": self.path} if self.path else dict(zip(self.names, self.sequences, strict=True))
        return {**shown, **self.statistics, "seconds": round(self.seconds, 2)}


def generate(
    model: str | Path | Backbone,
    prompt: str | Sequence[str],
    *,
    n: int = 1,
    length: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allow_n: bool = False,
    with_prompt: bool = False,
    seed: int = 0,
    genome: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
) -> Generated:
    """Generate DNA: genossm generate --model M --prompt ACGT --n 10 --length 1000 --out new.fa.

    Each sequence draws from its own random numbers, so it does not depend on how many others are made with it.

    Args:
        model: a folder that holds a causal model, or a backbone.
        prompt: what the sequences begin with; several of any lengths, with commas.
        n: sequences for each prompt.
        length: bases to add to each.
        temperature: divides the logits; 0 takes the likeliest base always.
        top_k: draw from the k likeliest bases; 0 from all.
        top_p: draw from the likeliest bases that together reach this probability.
        min_p: draw from the bases at least this fraction as likely as the likeliest.
        allow_n: let N be drawn too.
        with_prompt: begin the written sequences with their prompt.
        seed: of the random numbers.
        genome: FASTA whose composition is reported beside that of the sequences.
        out: FASTA to write; None prints the sequences.
        batch_size: sequences made at once.
        device: cpu or cuda; by default the GPU if there is one.
        overwrite: replace an existing file.

    Returns:
        The sequences and their statistics.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: an input or option is wrong; the message says which.
    """
    began = time.monotonic()
    sampling = Sampling(temperature, top_k, top_p, min_p)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    check(prompts, n, length, batch_size, out, overwrite)
    with opened(model, device) as ready:
        generator = Generator(ready, sampling, allow_n, seed)
        generator.check(max(map(len, prompts)) + length)
        with Progress("generating", len(prompts) * n * length, "bp") as progress:
            made = generator.run(prompts, n, length, batch_size, progress)
        said = f"model={ready.name} weights={ready.digest} seed={seed} {sampling}" + " allow_n" * allow_n
    names = [f"prompt{row // n + 1}_{row % n + 1}" for row in range(len(made))]
    statistics = describe([alphabet.from_text(text) for text in made], length, genome)
    if with_prompt:
        made = [prompts[row // n].upper() + text for row, text in enumerate(made)]
    path = Path(out) if out is not None else None
    if path is not None:
        records = [f">{name} {said}\n{text}\n" for name, text in zip(names, made, strict=True)]
        write_atomically(path, lambda temporary: temporary.write_text("".join(records)))
    return Generated(made, names, path, time.monotonic() - began, statistics)


def check(
    prompts: Sequence[str], n: int, length: int, batch_size: int, out: str | Path | None, overwrite: bool
) -> None:
    """Refuse prompts and numbers that nothing can be made of.

    Raises:
        ValueError: a prompt is empty or no DNA, or a number is below 1.
        FileExistsError: the output is there already.
    """
    for name, value in (("n", n), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    if not prompts or not all(prompts):
        raise ValueError("A prompt needs at least one base, for example --prompt ACGT.")
    for text in prompts:
        alphabet.from_text(text)
    if out is not None and Path(out).exists() and not overwrite:
        raise FileExistsError(f"{out} is there already. Choose another out, or replace it with --overwrite.")


class Generator:
    """Draws sequences from a causal model.

    Args:
        ready: the model.
        sampling: how a base is drawn.
        allow_n: whether N may be drawn.
        seed: of the random numbers.
    """

    def __init__(self, ready: Opened, sampling: Sampling, allow_n: bool, seed: int):
        self.ready, self.sampling, self.seed = ready, sampling, seed
        self.letters = "ACGTN" if allow_n else "ACGT"
        self.allowed_K = torch.tensor(ready.tokenizer.encode(self.letters).tolist(), device=ready.device)

    def check(self, total: int) -> None:
        """Refuse a model that can't generate, or not as much.

        Raises:
            ValueError: so it is.
        """
        model, tokenizer = self.ready.model, self.ready.tokenizer
        if not model.causal:
            raise ValueError(
                f"{model.config.model_type} sees both sides of a position and can't generate; use a causal model."
            )
        if tokenizer.bases_per_token != 1:
            raise ValueError("Generation needs a model with one token a base.")
        if model.max_length is not None and total > model.max_length:
            raise ValueError(
                f"Prompt and length make {total} bases; this model takes at most {model.max_length}. Shorten length."
            )
        if not model.streams:
            logger.warning(
                "%s can't run base by base: every base runs the whole sequence again", model.config.model_type
            )

    def run(self, prompts: Sequence[str], n: int, length: int, batch_size: int, progress: Progress) -> list[str]:
        """Return the added bases of `n` sequences for each prompt."""
        groups: dict[int, list[int]] = defaultdict(list)
        for row in range(len(prompts) * n):
            groups[len(prompts[row // n])].append(row)
        made = [""] * (len(prompts) * n)
        for rows in groups.values():
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                codes_BL = self._batch([prompts[row // n] for row in batch], batch, length, progress)
                for row, codes_L in zip(batch, codes_BL, strict=True):
                    made[row] = codes_L.tobytes().decode("ascii")
        return made

    def _batch(
        self, prompts: Sequence[str], rows: Sequence[int], length: int, progress: Progress
    ) -> npt.NDArray[np.uint8]:
        """Return ASCII letters (rows, length) for prompts of one length."""
        draws = [np.random.default_rng([self.seed, row]) for row in rows]
        letters = np.frombuffer(self.letters.encode(), dtype=np.uint8)
        made_BL = np.empty((len(rows), length), dtype=np.uint8)
        steps = self._steps(prompts)
        logits_BK = next(steps)
        uniform_BQ = np.empty((len(rows), 0))
        for at in range(length):
            if at % 1024 == 0:
                uniform_BQ = np.stack([draw.random(min(1024, length - at)) for draw in draws])
            uniform_B = torch.from_numpy(uniform_BQ[:, at % 1024]).to(logits_BK.device)
            picked_B = self.sampling.draw(logits_BK, uniform_B)
            made_BL[:, at] = letters[picked_B.cpu().numpy()]
            progress.advance(len(rows))
            if at + 1 < length:
                logits_BK = steps.send(self.allowed_K[picked_B])
        return made_BL

    def _steps(self, prompts: Sequence[str]) -> "Steps[Tensor, Tensor, None]":
        """Yield the logits of the allowed tokens after the prompts, then after each sent ids_B."""
        model = self.ready.model
        distinct = list(dict.fromkeys(text.upper() for text in prompts))
        ids_BL = torch.stack([self.ready.ids(alphabet.from_text(text)) for text in distinct]).to(self.ready.device)
        source_B = torch.tensor([distinct.index(text.upper()) for text in prompts], device=self.ready.device)
        if not model.streams:
            ids_BL = ids_BL.index_select(0, source_B)
            while True:
                ids_B = yield self._logits(model(ids_BL)[:, -1])
                ids_BL = torch.cat([ids_BL, ids_B[:, None].to(ids_BL.dtype)], 1)
        # Each distinct prompt is read once, whatever the number of sequences that begin with it.
        x_BLD, state = extend(model, ids_BL, model.init_state(len(distinct)))
        x_BD, state = x_BLD[:, -1].index_select(0, source_B), select_rows(state, source_B)
        while True:
            ids_B = yield self._logits(x_BD)
            x_BD, state = model.step(ids_B, state)

    def _logits(self, x_BD: Tensor) -> Tensor:
        return self.ready.model.logits(x_BD).float().index_select(-1, self.allowed_K)


def describe(sequences: Sequence[Bytes], length: int, genome: str | Path | None) -> dict[str, Any]:
    """Return the composition of sequences, and of as long windows of a genome.

    Args:
        sequences: stored bases.
        length: bases of each.
        genome: FASTA, or None.
    """
    statistics = {"sequences": _composition(sequences)}
    if genome is not None:
        store = Genome(genome)
        contigs = [store.codes(name) for name, size in store.contigs.items() if size >= length]
        if not contigs:
            raise ValueError(f"No contig of {genome} is as long as {length} bp; leave genome out.")
        spots = [contigs[row % len(contigs)] for row in range(_MOST_WINDOWS)]
        windows = [
            contig[start : start + length]
            for row, contig in enumerate(spots)
            for start in [(len(contig) - length) * row // max(1, len(spots) - 1)]
        ]
        statistics["genome"] = _composition(windows)
        statistics["sequences"][f"{_KMER}mer_divergence_bits"] = round(
            divergence(_spectrum(sequences), _spectrum(windows)), 5
        )
        halves = [_spectrum(windows[half::2]) for half in (0, 1)]
        statistics["genome"][f"{_KMER}mer_divergence_bits"] = round(divergence(*halves), 5)
    return statistics


def _spectrum(sequences: Sequence[Bytes]) -> npt.NDArray[np.int64]:
    return np.sum([kmer_counts(codes, _KMER) for codes in sequences], axis=0)


def _composition(sequences: Sequence[Bytes]) -> dict[str, float]:
    frames = [reading_frames(codes) for codes in sequences]
    bases = sum(map(len, sequences))
    return {
        "gc": round(gc_content(np.concatenate(list(sequences))), 4),
        "frames_of_30_codons_per_kb": round(1000 * sum(found.count for found in frames) / bases, 4),
        "longest_frame_codons": max(found.longest for found in frames),
    }
