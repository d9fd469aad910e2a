"""Lightning data modules: genome windows for pretraining."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import lightning as L
import torch

from genossm.data.base import Batch, NumberedBatches, RunLoader
from genossm.data.transforms import IGNORED, NextToken, Objective
from genossm.data.windows import (
    SAMPLINGS,
    SPLIT_POLICIES,
    Splits,
    WindowBatches,
    fit_windows,
    read_splits,
    split_genome,
)
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval
from genossm.dna.tokenizer import CharTokenizer

BUNDLED = "bundled"
_BUNDLED_STEM = "human_chr20_b37_33260000-34308576"


def bundled(suffix: str) -> Path:
    """Return the path of a bundled file: "fa.gz" the 2^20 bp of human chr20, "intervals.bed", "exons.bed.gz"."""
    return Path(str(resources.files("genossm") / "assets" / f"{_BUNDLED_STEM}.{suffix}"))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a length warm-up: for `batches` batches, windows of `length` tokens, `batch_size` a process."""

    batches: int
    length: int
    batch_size: int

    def __post_init__(self) -> None:
        if min(self.batches, self.length, self.batch_size) < 1:
            raise ValueError(f"A stage needs batches, length and batch_size of at least 1; got {self}.")


def _stage(given: Stage | Mapping[str, int]) -> Stage:
    if isinstance(given, Stage):
        return given
    try:
        return Stage(**given)
    except TypeError:
        raise ValueError(
            f"A stage of data.warmup is {{batches: 1000, length: 512, batch_size: 16}}; got {dict(given)}."
        ) from None


class _TrainBatches(NumberedBatches):
    def __init__(self, windows: WindowBatches, stages: Sequence[Stage], last: Stage, rank: int, world: int):
        self.windows, self.stages, self.last, self.rank, self.world = windows, list(stages), last, rank, world

    def stage(self, number: int) -> Stage:
        for stage in self.stages:
            if number < stage.batches:
                return stage
            number -= stage.batches
        return self.last

    def __getitem__(self, index: int) -> Batch:
        stage = self.stage(index)
        first = self.rank * stage.batch_size
        rows = range(first, first + stage.batch_size)
        return self.windows.drawn(index, rows, stage.batch_size * self.world, stage.length)


class _EvalBatches(NumberedBatches):
    """One process's share of the fixed windows: every process has as many batches, the last of them may not count."""

    def __init__(self, windows: WindowBatches, tiles: Sequence[Interval], batch_size: int, rank: int, world: int):
        self.windows, self.batch_size = windows, batch_size
        self.own = [tiles[i] for i in range(rank, len(tiles), world)]
        self.count = -(-len(range(0, len(tiles), world)) // batch_size)
        self.spare = tiles[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        tiles = self.own[index * self.batch_size : (index + 1) * self.batch_size]
        batch = self.windows.tiled(tiles or [self.spare])
        if not tiles:
            batch["targets"] = torch.full_like(batch["targets"], IGNORED)
        return batch


class GenomeWindows(L.LightningDataModule):
    """Windows of a genome: random ones for training, fixed ones that cover the held-out splits for evaluation.

    Args:
        fasta: FASTA file or files, or "bundled" for the shipped 2^20 bp of human chr20.
        bed: intervals (chrom, start, end and, for HyenaDNA's form, split); None divides the genome by `split`, and
            takes the shipped intervals for the bundled genome.
        length: tokens a window.
        batch_size: windows a batch and process.
        split: "auto", "contigs" or "blocks" where no file says what is held out.
        val, test: shares held out then.
        reverse_complement: draw each training window's strand.
        max_n: largest share of N in a training window.
        sampling: "random" windows, "tile" (side by side, all of them once a pass) or "hyenadna_legacy" (the first
            window of each interval alone, which is 1 % of the genome at 1,024 tokens).
        shift: tiles are moved by up to so many bases, within their interval.
        soft_mask_weight: loss weight of soft-masked (lower-case) bases.
        lower_case: how the tokenizer reads soft-masked letters: "upper" or "unknown".
        eval_windows: at most so many held-out windows, evenly chosen; None takes all.
        warmup: stages of a length warm-up that come before the windows of `length`, as `Stage` or its values by name.
        num_workers: processes that prepare batches; 0 is fastest for memory-mapped bytes.
        cache: folder for encoded genomes.
        seed: what windows, strands and masks are drawn from.
        objective: makes inputs and targets; the task gives it.
        batches: batches of the whole run.

    Raises:
        ValueError, FileNotFoundError: see `Genome`, `read_splits`, `fit_windows`.
    """

    def __init__(
        self,
        fasta: str | Sequence[str] = BUNDLED,
        bed: str | None = None,
        length: int = 1024,
        batch_size: int = 8,
        split: str = "auto",
        val: float = 0.05,
        test: float = 0.05,
        reverse_complement: bool = True,
        max_n: float = 0.5,
        sampling: str = "random",
        shift: int = 0,
        soft_mask_weight: float = 1.0,
        lower_case: str = "upper",
        eval_windows: int | None = None,
        eval_batch_size: int | None = None,
        warmup: Sequence[Stage | Mapping[str, int]] = (),
        num_workers: int = 0,
        cache: str | None = None,
        seed: int = 0,
        objective: Objective | None = None,
        batches: int = 1,
    ):
        super().__init__()
        for name, value in (("length", length), ("batch_size", batch_size), ("eval_windows", eval_windows)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1; got {value}.")
        if split not in SPLIT_POLICIES:
            raise ValueError(f"data.split must be one of {', '.join(SPLIT_POLICIES)}; got {split!r}.")
        if sampling not in SAMPLINGS:
            raise ValueError(f"data.sampling must be one of {', '.join(SAMPLINGS)}; got {sampling!r}.")
        if soft_mask_weight < 0:
            raise ValueError(f"data.soft_mask_weight must be at least 0; got {soft_mask_weight}.")
        if min(val, test) < 0 or val + test >= 1:
            raise ValueError(f"data.val and data.test are shares that sum to less than 1; got {val} and {test}.")
        self.fasta, self.bed, self.cache = fasta, bed, cache
        self.length, self.batch_size, self.eval_batch_size = length, batch_size, eval_batch_size or batch_size
        self.split, self.shares = split, (val, test)
        self.eval_windows, self.warmup, self.num_workers, self.batches = (
            eval_windows,
            [_stage(stage) for stage in warmup],
            num_workers,
            batches,
        )
        self.options = {
            "objective": objective or NextToken(),
            "tokenizer": CharTokenizer(lower_case),
            "seed": seed,
            "reverse_complement": reverse_complement,
            "max_n": max_n,
            "soft_mask_weight": soft_mask_weight,
            "sampling": sampling,
            "shift": shift,
        }
        self.genome: Genome
        self.splits: Splits

    def prepare_data(self) -> None:
        """Encode the genome once a machine; the process that does it has opened it then."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open the genome and divide it."""
        if hasattr(self, "splits"):
            return
        self.genome, self.splits = self._open()

    def _open(self) -> tuple[Genome, Splits]:
        fasta, bed = self.fasta, self.bed
        if fasta == BUNDLED:
            fasta, bed = str(bundled("fa.gz")), bed or str(bundled("intervals.bed"))
        genome = Genome(fasta, self.cache)
        if bed is None:
            splits = split_genome(genome, self.split, *self.shares)
        else:
            splits = read_splits(genome, bed, self.split, *self.shares)
        span = self.length + isinstance(self.options["objective"], NextToken)
        longest = max([span, *(stage.length + 1 for stage in self.warmup)])
        fitted = fit_windows(splits, longest, genome, join=self.options["sampling"] != "hyenadna_legacy")
        for name in ("train", "val"):
            if not fitted[name]:
                raise ValueError(f"The {name} split is empty; give more intervals or larger shares.")
        return genome, fitted

    def windows(self, split: str) -> WindowBatches:
        """Return the windows of a split."""
        return WindowBatches(genome=self.genome, intervals=self.splits[split], **self.options)  # type: ignore[arg-type]

    def train_dataloader(self) -> RunLoader:
        """Return the loader of the whole run."""
        rank, world = self._place()
        last = Stage(batches=1, length=self.length, batch_size=self.batch_size)
        batches = _TrainBatches(self.windows("train"), self.warmup, last, rank, world)
        return RunLoader(batches, self.batches, self.num_workers, self._pin())

    def val_dataloader(self) -> RunLoader:
        """Return the loader of the fixed validation windows."""
        return self._eval("val")

    def test_dataloader(self) -> RunLoader:
        """Return the loader of the fixed test windows."""
        return self._eval("test")

    def _eval(self, split: str) -> RunLoader:
        windows = self.windows(split)
        rank, world = self._place()
        tiles = windows.tiles(self.length, self.eval_windows)
        batches = _EvalBatches(windows, tiles, self.eval_batch_size, rank, world)
        return RunLoader(batches, len(batches), pin_memory=self._pin())

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _pin(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
