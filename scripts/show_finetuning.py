"""Measure fine-tuning on GPUs: pretraining on human chr20, then real tasks from fresh and from pretrained weights.

    python scripts/show_finetuning.py --data DIR --out DIR --gpus 2 --seconds 500

DIR of --data holds human_GRCh37_chr20.fa.gz, human_chr20_splice_400.tsv.gz, the chr20 parts of GenomicBenchmarks
(*.chr20.tsv.gz, *.subset.tsv.gz) and nt_downstream_revised.train_sample1500.tsv.gz; what is missing is left out.

1. pretraining: HyenaDNA and Caduceus-Ph, one a GPU, for --pretrain-seconds each, on random 1,024-bp windows of
   0.06-48 Mb without the test rows of every task; bits per base on 2,048 fixed windows of 50.0-62.9 Mb.
2. tasks: every setting (task, backbone, fresh or pretrained) runs with three seeds; a tenth of train, drawn by the
   seed, is validation, the best epoch is tested once. Fresh and pretrained weights have the same epochs, batches and
   rates. Splice sites are also learned with a tenth of the bases of each row exchanged, and in two steps: first,
   base by base, where train's sites lie in its rows ("sites"), then the task as always.
3. k-mers (1 to 5, logistic regression) on the same rows.
4. what an average of several runs gives: the mean of their probabilities on the test rows, which all share.

results.json in --out is written after every cell, results.md at the end; what is there already is not run again.
--tiny runs every cell in a minute or two on a CPU.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "hyenadna": {"model_type": "hyenadna", "d_model": 128, "n_layer": 2, "max_length": 1026},
    "hyenadna-d192": {
        "model_type": "hyenadna",
        "d_model": 192,
        "n_layer": 4,
        "d_inner": 384,
        "max_length": 1026,
        "shift": 0.0,
    },
    "hyenadna-both": {
        "model_type": "hyenadna",
        "d_model": 128,
        "n_layer": 2,
        "max_length": 1026,
        "bidirectional": True,
    },
    "caduceus-ph": {"model_type": "caduceus", "d_model": 118, "n_layer": 4, "tie_embeddings": False},
    "caduceus-ps": {"model_type": "caduceus", "d_model": 118, "n_layer": 4, "rcps": True},
    "transformer": {"model_type": "transformer", "d_model": 128, "n_layer": 4, "n_head": 4, "causal": False},
    "cnn": {"model_type": "cnn", "d_model": 96, "n_layer": 6, "causal": False},
    "cnn-deep": {"model_type": "cnn", "d_model": 128, "n_layer": 12, "causal": False, "residual_dropout": 0.1},
}
"""The small shape of each backbone; HyenaDNA and Caduceus have the sizes of the published 1k models, hyenadna-d192 is
what trains as many tokens in the seconds given as the published code does at the smaller size."""

PRETRAINED = ("hyenadna-d192", "caduceus-ph")
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "hyenadna-d192": (
        {"optimizer": "muon", "matrix_lr": 0.01, "lr": 1.5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
        64,
    ),
    "caduceus-ph": ({"optimizer": "adamw", "lr": 4e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}, 256),
}
"""Optimizer and windows of a batch of pretraining."""
OPTIONS: dict[str, list[str]] = {
    "plain": ["optim.lr=1e-3"],
    "mutated": ["optim.lr=1e-3", "loader.mutate=0.1", "supervised.label_smoothing=0.05", "optim.weight_decay=0.2"],
    "sites": ["optim.lr=5e-4", "loader.mutate=0.02", "supervised.label_smoothing=0.05"],
    "long": [
        "optim.lr=1e-3",
        "optim.optimizer=muon",
        "optim.matrix_lr=0.01",
        "optim.weight_decay=0.1",
        "loader.mutate=0.05",
        "supervised.label_smoothing=0.05",
    ],
}
"""How a setting is trained: as the default says; with a tenth of the bases of each row exchanged at random; after it
has been taught base by base; or with a twentieth exchanged, by Muon, twice as long."""
FEW_EPOCHS = 8
"""Passes over train after the base-by-base ones."""

LENGTH = 1024
SEEDS = (1, 2, 3)
SPLICE = "splice"
NT = "nt_sample"
EPOCHS = {SPLICE: 20, NT: 20}
"""Passes over train; the parts of GenomicBenchmarks take 15."""
TEST, VAL, TRAIN = (50_000_000, 62_900_000), (48_500_000, 49_500_000), (60_000, 48_000_000)


def main() -> None:
    """Run the stages asked for until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the genome and the tables")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the pretrained models")
    parser.add_argument("--have", type=Path, help="--out of an earlier run to go on from")
    parser.add_argument("--seconds", type=float, default=500, help="after which everything stops by itself")
    parser.add_argument("--pretrain-seconds", type=float, default=110, help="of training, a model; 0 skips it")
    parser.add_argument("--gpus", type=int, default=1, help="workers are dealt out over so many")
    parser.add_argument("--jobs", type=int, default=7, help="cells at a time on a GPU")
    parser.add_argument("--only", nargs="*", default=[], help="words of which one must be in a cell's name")
    parser.add_argument("--tiny", action="store_true", help="every cell with a few rows and steps")
    arguments = parser.parse_args()
    show = Show(arguments)
    threading.Thread(target=show.stop_in_time, daemon=True).start()
    show.run()
    show.finish(0)


class Show:
    """The cells, what they gave, and the processes that run them."""

    def __init__(self, arguments: argparse.Namespace):
        self.began = time.monotonic()
        self.arguments = arguments
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        have = arguments.have or self.out
        if have != self.out:
            shutil.copytree(have, self.out, dirs_exist_ok=True)
        file = self.out / "results.json"
        self.results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        self.results = [row for row in self.results if "error" not in row and self.still_there(row)]
        self.lock = threading.Lock()
        self.pools: set[ProcessPoolExecutor] = set()
        self.tasks = tasks_of(arguments.data)
        self.waiting = [cell for cell in all_cells(self.tasks) if self.wanted(cell)]
        self.running = 0
        self.pretraining: set[str] = set()
        self.busy: set[int] = set()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def still_there(self, row: dict[str, Any]) -> bool:
        return row["stage"] != "pretraining" or (self.out / row["name"].split()[-1]).exists()

    def wanted(self, cell: dict[str, Any]) -> bool:
        words, done = self.arguments.only, {row["name"] for row in self.results}
        return cell["name"] not in done and (not words or any(word in cell["name"] for word in words))

    def left(self) -> float:
        return self.arguments.seconds - (time.monotonic() - self.began)

    def run(self) -> None:
        """Pretrain one model a GPU, then serve the cells with several workers a GPU."""
        arguments = self.arguments
        self.say(f"{len(self.waiting)} cells; tasks {', '.join(self.tasks)}")
        bed = arguments.data / "pretrain.bed"
        names = [name for name in PRETRAINED if not (self.out / name).exists()]
        fasta = arguments.data / "human_GRCh37_chr20.fa.gz"
        if names and fasta.exists() and arguments.pretrain_seconds > 0:
            if not bed.exists():
                bed = self.out / "pretrain.bed"
                bed.write_text(pretraining_bed(fasta, self.tasks.values()))
                self.say(f"wrote {bed}")
            self.pretraining = set(names)
        # A GPU that pretrains does nothing else, so that its seconds are comparable.
        self.busy = set(range(min(arguments.gpus, len(self.pretraining))))
        threads = [
            threading.Thread(target=self.pretrain, args=(names[gpu :: arguments.gpus], gpu, fasta, bed))
            for gpu in self.busy
        ]
        threads += [
            threading.Thread(target=self.serve, args=(worker % arguments.gpus,))
            for worker in range(arguments.jobs * arguments.gpus)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def pool(self, gpu: int) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=bind, initargs=(gpu,))
        self.pools.add(pool)
        return pool

    def pretrain(self, names: list[str], gpu: int, fasta: Path, bed: Path) -> None:
        pool = self.pool(gpu)
        for name in names:
            try:
                row = pool.submit(pretrain, name, str(fasta), str(bed), vars(self.arguments)).result()
            except Exception as error:
                row = {"stage": "pretraining", "name": f"pretraining {name}", "error": short(error)}
            self.keep(row)
            self.pretraining.discard(name)
        self.busy.discard(gpu)
        pool.shutdown(wait=False)

    def serve(self, gpu: int) -> None:
        """Run cells in a process of this thread's own; a killed one takes its cell with it, and a new one goes on."""
        pool = self.pool(gpu)
        while (cell := self.next_cell(gpu)) is not None:
            if not cell:
                time.sleep(0.5)
                continue
            began = time.monotonic()
            try:
                found = pool.submit(RUNNERS[cell["stage"]], cell, vars(self.arguments)).result()
            except BrokenProcessPool as error:
                found, pool = {"error": short(error)}, self.pool(gpu)
            except Exception as error:
                found = {"error": short(error)}
            self.keep({**cell, **found, "wall": round(time.monotonic() - began, 1)})
            with self.lock:
                self.running -= 1
        pool.shutdown(wait=False)

    def next_cell(self, gpu: int) -> dict[str, Any] | None:
        """Return a cell that can run now, {} where one has to wait, None where none is left or time is up."""
        with self.lock:
            if self.left() < 25 or not (self.waiting or self.running):
                return None
            for number, cell in enumerate(self.waiting):
                if cell["stage"] == "kmers" or not (gpu in self.busy or self.missing(cell)):
                    self.running += 1
                    return self.waiting.pop(number)
            if not self.pretraining and not self.running:
                return None  # What is left needs a model that failed.
            return {}

    def missing(self, cell: dict[str, Any]) -> bool:
        return cell["weights"] == "pretrained" and not (self.out / cell["model"] / "config.json").exists()

    def keep(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.results.append(row)
            temporary = self.out / ".results.json"
            temporary.write_text(json.dumps(self.results, indent=1) + "\n")
            temporary.rename(self.out / "results.json")
        self.say(json.dumps({k: v for k, v in row.items() if k not in ("table", "overrides")}))

    def stop_in_time(self) -> None:
        while self.left() > 0:
            time.sleep(0.5)
        self.say("time is up")
        self.finish(0)

    def finish(self, code: int) -> None:
        """Write the tables and end, with the processes that were started here."""
        try:
            text = markdown(self.results) + averages(self.out / "predictions")
            (self.out / "results.md").write_text(text)
            print(text, flush=True)
        except Exception:
            traceback.print_exc()
        for pool in list(self.pools):
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.kill()
        sys.stdout.flush()
        os._exit(code)


def short(error: BaseException) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {error}"[:500]


def bind(gpu: int) -> None:
    """Show this process one GPU and give it two threads."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[gpu]
    os.environ["OMP_NUM_THREADS"] = "2"


def tasks_of(folder: Path) -> dict[str, Path]:
    """Return the tables that are there, by the names of their tasks."""
    found = {SPLICE: folder / "human_chr20_splice_400.tsv.gz"}
    for path in sorted([*folder.glob("*.chr20.tsv.gz"), *folder.glob("*.subset.tsv.gz")]):
        found[path.name.split(".")[0]] = path
    found[NT] = folder / "nt_downstream_revised.train_sample1500.tsv.gz"
    return {name: path for name, path in found.items() if path.exists()}


def all_cells(tasks: dict[str, Path]) -> list[dict[str, Any]]:
    """Return the cells in the order in which they run."""
    cells = [
        {
            "stage": "kmers",
            "name": f"{task}, k-mers, seed {seed}",
            "task": task,
            "weights": "",
            "model": "",
            "seed": seed,
        }
        for task in tasks
        for seed in SEEDS
    ]
    both = ("fresh", "pretrained")
    order: list[tuple[str, str, str, str, int]] = []
    if SPLICE in tasks:
        order += [(SPLICE, model, "fresh", "plain", 1) for model in ("caduceus-ps", *SHAPES)]
        order += [(SPLICE, model, "fresh", "long", 1) for model in ("caduceus-ph", "cnn-deep")]
        order += [(SPLICE, "caduceus-ph", w, "mutated", 1) for w in both]
        order += [(SPLICE, "caduceus-ph", w, "plain", seed) for seed in SEEDS for w in both]
        order += [
            (SPLICE, m, "fresh", "sites", seed) for m in ("caduceus-ph", "cnn") for seed in SEEDS if SPLICE in tasks
        ]
    order += [(SPLICE, "hyenadna-d192", w, "plain", seed) for seed in SEEDS for w in both]
    order += [(t, m, w, "plain", s) for s in SEEDS for m in PRETRAINED for t in tasks for w in both if t != SPLICE]
    order += [(SPLICE, "caduceus-ph", w, "mutated", s) for s in SEEDS for w in both if SPLICE in tasks]
    order += [(SPLICE, m, "fresh", "mutated", 1) for m in ("cnn", "hyenadna-both") if SPLICE in tasks]
    return cells + [tune_cell(*setting) for setting in dict.fromkeys(order)]


def tune_cell(task: str, model: str, weights: str, option: str, seed: int) -> dict[str, Any]:
    """Return one fine-tuning run."""
    return {
        "stage": "tune",
        "name": f"{task}, {model}, {weights}, {option}, seed {seed}",
        "task": task,
        "model": model,
        "weights": weights,
        "option": option,
        "seed": seed,
    }


def pretraining_bed(fasta: Path, tables: Any) -> str:
    """Return the intervals of pretraining: train without every test row of the tables, found by their letters.

    A 32-mer of a test row that the chromosome holds once, counted on both strands, marks its place; rows of spliced
    messengers are found exon by exon this way, and marks at most 500 bases apart are joined, and
    100 bases on both sides are left out too. What comes more than once marks nothing: it would take every copy of
    a repeat that a test row touches out of training.
    """
    import numpy as np
    import pandas as pd

    from genossm.dna import alphabet
    from genossm.dna.genome import Genome

    def codes_of(bases: Any) -> tuple[Any, Any]:
        """Return a 64-bit code of each 32-mer, the same for both strands, and whether it holds no N."""
        base = (bases & np.uint8(0x7F)).astype(np.uint64) - np.uint64(alphabet.A)
        known = base < 4
        # The complement of code c is 3 - c; read backwards, the base that comes last weighs most.
        code, other, size = base & np.uint64(3), np.uint64(3) - (base & np.uint64(3)), 1
        while size < 32:
            code = (code[:-size] << np.uint64(2 * size)) | code[size:]
            other = other[:-size] | (other[size:] << np.uint64(2 * size))
            known = known[:-size] & known[size:]
            size *= 2
        return np.minimum(code, other), known

    wanted: list[Any] = []
    for path in tables:
        table = pd.read_csv(path, sep="\t")
        if "split" not in table or "seq" not in table:
            continue
        wanted += [
            codes_of(alphabet.from_text(text))[0]
            for text in table.loc[table["split"] == "test", "seq"]
            if len(text) >= 32
        ]
    keys = np.unique(np.concatenate(wanted))
    genome = Genome(str(fasta))
    name = next(iter(genome.contigs))
    bases = genome.codes(name)
    counts, places = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    for first in range(0, genome.contigs[name], 1 << 22):
        code, known = codes_of(np.asarray(bases[first : first + (1 << 22) + 31]))
        which = np.searchsorted(keys, code).clip(max=len(keys) - 1)
        hits = np.flatnonzero(known & (keys[which] == code))
        np.add.at(counts, which[hits], 1)
        places[which[hits]] = first + hits
    marks = np.sort(places[counts == 1])
    joined = np.flatnonzero(np.diff(marks, prepend=-(1 << 30)) > 32 + 500)
    starts, ends = marks[joined] - 100, np.append(marks[joined[1:] - 1], marks[-1]) + 32 + 100
    begins, stops = np.append(TRAIN[0], ends), np.append(starts, TRAIN[1])
    free = [(max(s, TRAIN[0]), min(e, TRAIN[1])) for s, e in zip(begins.tolist(), stops.tolist(), strict=True)]
    kept = [(s, e) for s, e in free if e - s > LENGTH]
    lines = [f"{name}\t{s}\t{e}\ttrain\n" for s, e in kept]
    return "".join([*lines, *(f"{name}\t{s}\t{e}\t{split}\n" for (s, e), split in ((VAL, "val"), (TEST, "test")))])


def pretrain(name: str, fasta: str, bed: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train a backbone for the seconds given, the rate falling with the clock, and measure it on the held-out end."""
    import torch

    from genossm import checkpoint
    from genossm.data.datamodule import GenomeWindows
    from genossm.data.transforms import MaskTokens, NextToken

    began = time.monotonic()
    tiny, device = arguments["tiny"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    model = build_backbone(name, tiny).to(device).train()
    rows = 2 if tiny else RECIPES[name][1]
    seconds = min(3.0, arguments["pretrain_seconds"]) if tiny else arguments["pretrain_seconds"]
    windows = GenomeWindows(
        fasta,
        bed,
        length=LENGTH,
        batch_size=rows,
        eval_batch_size=2 if tiny else 256,
        eval_windows=2 if tiny else 2048,
        num_workers=4 if device.type == "cuda" else 0,
        seed=1,
        objective=NextToken() if model.causal else MaskTokens(),
        batches=10**7,
    )
    windows.setup()
    batches = iter(windows.train_dataloader())
    first = {key: value.to(device) for key, value in next(batches).items()}
    step, graphed = step_of(model, first, device)
    prepared = time.monotonic() - began
    trained = train_by_the_clock(model, step, batches, RECIPES[name][0], seconds, device)
    row = {
        "stage": "pretraining",
        "name": f"pretraining {name}",
        "parameters": model.num_parameters(),
        "prepared": round(prepared, 1),
        **trained,
        "graphed": graphed,
        "tokens": trained["steps"] * rows * LENGTH,
        "train bases": sum(len(interval) for interval in windows.splits["train"]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        **measure(model.eval(), windows, device),
    }
    temporary = arguments["out"] / f".{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.save(model.cpu(), temporary, {key: row[key] for key in ("seconds", "steps", "tokens", "test/bits")})
    temporary.rename(arguments["out"] / name)
    return row


def step_of(model: Any, first: dict[str, Any], device: Any) -> tuple[Any, str]:
    """Return what makes a loss of ids and targets, forward and backward recorded as graphs where a GPU can do that."""
    import torch
    from torch.nn import functional as F

    from genossm.data.transforms import IGNORED

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids_BL: Any, targets_BL: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
                logits_BLV = self.model.logits(self.model(ids_BL)).float()
            return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten().long(), ignore_index=IGNORED)

    loss = Loss()
    for _ in range(3):
        loss(first["ids_BL"], first["targets"]).backward()
    model.zero_grad(set_to_none=True)
    if device.type != "cuda":
        return loss, "no"
    torch.cuda.synchronize()
    try:
        graphed = torch.cuda.make_graphed_callables(loss, (first["ids_BL"], first["targets"]), allow_unused_input=True)
        graphed(first["ids_BL"], first["targets"]).backward()
        torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
        return graphed, "yes"
    except Exception as error:
        traceback.print_exc()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        fresh = Loss()
        return fresh, f"no: {short(error)}"


def train_by_the_clock(
    model: Any, step: Any, batches: Any, recipe: dict[str, Any], seconds: float, device: Any
) -> dict[str, Any]:
    """Train until the seconds are over; returns them and the steps."""
    import torch

    from genossm.optim import Optim

    optim = Optim(**recipe, warmup=0.02, min_lr_ratio=0.005)
    optimizer = optim.build(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [p for p in model.parameters() if p.requires_grad]
    began, steps, losses = time.monotonic(), 0, []
    while (passed := time.monotonic() - began) < seconds:
        factor = optim.factor(round(100_000 * passed / seconds), 100_000)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = next(batches)
        ids_BL, targets_BL = (batch[key].to(device, non_blocking=True) for key in ("ids_BL", "targets"))
        loss = step(*((ids_BL, targets_BL) if model.causal else mask_as_published(ids_BL, targets_BL)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        steps += 1
        if steps % 100 == 0:
            losses.append(round(float(loss) / 0.6931, 3))  # Also keeps the queue of kernels short.
    if device.type == "cuda":
        torch.cuda.synchronize()
    passed = time.monotonic() - began
    return {"seconds": round(passed, 1), "steps": steps, "bits on the way": losses[:: max(1, len(losses) // 12)]}


def mask_as_published(ids_BL: Any, targets_BL: Any, kinds: int = 12) -> tuple[Any, Any]:
    """Mask a batch anew as the published loader does: 15 %, 80/10/10, random ones from all 12 ids, special ones too.

    A special id tells that a base was exchanged, which makes these targets easier; bits compare with those of the
    published code under the same masks alone. `kinds=4` draws from the four bases.
    """
    import torch

    from genossm.data.transforms import IGNORED
    from genossm.dna import alphabet
    from genossm.dna.tokenizer import CharTokenizer

    truth_BL = torch.where(targets_BL == IGNORED, ids_BL, targets_BL.to(ids_BL.dtype))
    known_BL = (truth_BL >= alphabet.A) & (truth_BL < alphabet.A + 4)
    chosen_BL = known_BL & (torch.rand(ids_BL.shape, device=ids_BL.device) < 0.15)
    way_BL = torch.rand(ids_BL.shape, device=ids_BL.device)
    first = 0 if kinds == 12 else alphabet.A
    random_BL = torch.randint_like(ids_BL, first, first + kinds)
    shown_BL = torch.where(way_BL < 0.8, torch.full_like(ids_BL, CharTokenizer.mask_id), truth_BL)
    shown_BL = torch.where(way_BL >= 0.9, random_BL, shown_BL)
    ignored_BL = torch.full_like(targets_BL, IGNORED)
    return torch.where(chosen_BL, shown_BL, truth_BL), torch.where(chosen_BL, truth_BL.to(ignored_BL.dtype), ignored_BL)


def measure(model: Any, windows: Any, device: Any) -> dict[str, float]:
    """Return bits per base and accuracy on the fixed windows of the held-out end; under masking of the hidden bases."""
    import torch
    from torch.nn import functional as F

    from genossm.data.transforms import IGNORED
    from genossm.dna.tokenizer import CharTokenizer

    nats, right, count = 0.0, 0, 0
    in_all = {kinds: [0.0, 0] for kinds in (4, 12)}
    torch.manual_seed(1)
    with torch.no_grad():
        for batch in windows.test_dataloader():
            ids_BL, targets_BL = batch["ids_BL"].to(device), batch["targets"].to(device).long()
            for kinds, counted in in_all.items() if not model.causal else [(0, [0.0, 0])]:
                if kinds:
                    ids_BL, targets_BL = mask_as_published(ids_BL, targets_BL, kinds)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits_BLV = model.logits(model(ids_BL)).float()
                chosen_BL = targets_BL != IGNORED
                losses_BL = F.cross_entropy(
                    logits_BLV.transpose(1, 2), targets_BL, ignore_index=IGNORED, reduction="none"
                )
                counted[0], counted[1] = counted[0] + float(losses_BL.sum()), counted[1] + int(chosen_BL.sum())
                if kinds == 12:
                    continue
                hidden_BL = chosen_BL if model.causal else chosen_BL & (ids_BL == CharTokenizer.mask_id)
                nats, count = nats + float(losses_BL[hidden_BL].sum()), count + int(hidden_BL.sum())
                right += int((logits_BLV.argmax(-1) == targets_BL)[hidden_BL].sum())
    found = {"test/bits": nats / count / 0.693147, "test/accuracy": right / count}
    if not model.causal:
        for kinds, (summed, counted_bases) in in_all.items():
            found[f"test/bits of all targets, random ones of {kinds} ids"] = summed / counted_bases / 0.693147
    return {key: round(value, 4) for key, value in found.items()}


def build_backbone(name: str, tiny: bool) -> Any:
    """Return a fresh backbone of `SHAPES`."""
    from genossm.models.base import config_from_dict

    return config_from_dict(SHAPES[name] | ({"d_model": 16, "n_layer": 1} if tiny else {})).build()


def tables_of(cell: dict[str, Any], arguments: dict[str, Any]) -> list[Any]:
    """Return the task's data: one table, or one for each of the tasks that the NT sample holds a few rows of."""
    import pandas as pd

    from genossm.data.table import Table

    path = tasks_of(arguments["data"])[cell["task"]]
    frame = pd.read_csv(path, sep="\t")
    parts = [frame] if "task" not in frame else [part for _, part in sorted(frame.groupby("task"), key=lambda p: p[0])]
    if "task" in frame:
        parts = [hold_out(part) for part in parts]
    if arguments["tiny"]:
        label = "cls" if "cls" in frame else "label"
        parts = [part.groupby([label, "split"]).head(8) for part in parts[:2]]
    folder = Path(tempfile.mkdtemp(prefix="show_"))
    found: list[Any] = []
    for number, part in enumerate(parts):
        file = folder / f"{cell['task']}_{number}.csv"
        part.drop(columns=[c for c in ("id", "name", "task") if c in part]).to_csv(file, index=False)
        found.append(Table(table=str(file)))
    return found


def hold_out(part: Any) -> Any:
    """Return rows with a split: every fifth row of each class, in the order of the file, is test."""
    rank = part.groupby("label").cumcount()
    return part.assign(split=["test" if number % 5 == 4 else "train" for number in rank])


def tune(cell: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune one setting and return what was measured; several tables count as one, their test rows together."""
    import torch

    from genossm import checkpoint
    from genossm.finetune import finetune

    root = Path(tempfile.mkdtemp(prefix="show_"))
    source = arguments["out"] / cell["model"]
    if cell["weights"] == "fresh":
        torch.manual_seed(cell["seed"])
        source = root / "fresh"
        checkpoint.save(build_backbone(cell["model"], arguments["tiny"]), source)
    overrides = overrides_of(cell, arguments["tiny"])
    taught = 0.0
    if cell["option"] == "sites":
        source, taught = teach_sites(cell, arguments, source, root)
    right = counted = 0
    found: list[Any] = []
    for table in tables_of(cell, arguments):
        result = finetune(table, source, [*overrides, f"output='{root}'"])
        rows = json.loads((result.folder / "result.json").read_text())["rows"]["test"]
        right += result.metrics["test/accuracy"] * rows
        counted += rows
        found.append(result)
        if cell["task"] == SPLICE:
            kept = arguments["out"] / "predictions"
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(result.folder / "predictions.csv", kept / f"{cell['name'].replace(', ', '_')}.csv")
    shutil.rmtree(root, ignore_errors=True)
    values = {
        "parameters": found[0].model.backbone.num_parameters(),
        "test/accuracy": right / counted,
        "val/accuracy": statistics.mean(result.metrics["val/accuracy"] for result in found),
        "test/mcc": statistics.mean(result.metrics["test/mcc"] for result in found),
        "seconds": taught + sum(result.metrics["seconds"] for result in found),
        "steps": sum(result.metrics["steps"] for result in found),
        "test rows": counted,
    }
    values = {key: round(value, 4) for key, value in values.items()}
    if len(found) == 1:
        values["interval"] = [round(x, 4) for x in found[0].interval]
    return values | {"overrides": overrides}


def teach_sites(cell: dict[str, Any], arguments: dict[str, Any], source: Path, root: Path) -> tuple[Path, float]:
    """Train base by base on where the sites of the training rows lie in each other; returns the model and the seconds.

    The rows of validation and test are not looked at: their sites are no sites here.
    """
    import pandas as pd

    from genossm import checkpoint
    from genossm.data.protocols import divide
    from genossm.data.table import Table
    from genossm.finetune import finetune

    rows = divide(tables_of(cell, arguments)[0].load(), "caduceus_cv", cell["seed"])[0]["train"]
    names = ("acceptor", "donor")
    letters: dict[tuple[int, str], str] = {}
    for row in rows:
        middle = (row.interval.start + row.interval.end) // 2
        label = ("acceptor", "donor", "none")[row.target]
        if label in names:
            letters[middle, row.interval.strand] = label[0]
    found = []
    for number, row in enumerate(rows):
        start, end, strand = row.interval.start, row.interval.end, row.interval.strand
        # On the other strand a row is read from its end, where position p lies between bases end - p - 1 and end - p.
        places = range(start, end) if strand == "+" else range(end, start, -1)
        labels = "".join(letters.get((place, strand), "n") for place in places)
        split = {0: "val", 10: "test"}.get(number % 20, "train")
        found.append({"sequence": row.sequence, "label": labels, "split": split})
    file = root / "sites.csv"
    pd.DataFrame(found).to_csv(file, index=False)
    overrides = [
        o for o in overrides_of(cell, arguments["tiny"]) if not o.startswith(("head.pooling", "protocol", "epochs"))
    ]
    result = finetune(
        Table(table=str(file), kind="per_base"),
        source,
        [
            *overrides,
            f"epochs={1 if arguments['tiny'] else EPOCHS[SPLICE]}",
            "optim.lr=1e-3",
            "supervised.label_smoothing=0",
            "supervised.class_weights=[1.0,1.0,0.05]",
            "protocol=given",
            "monitor=loss",
            f"output='{root}'",
        ],
    )
    taught = root / "taught"
    checkpoint.save(result.model.backbone, taught)
    return taught, result.metrics["seconds"]


def overrides_of(cell: dict[str, Any], tiny: bool) -> list[str]:
    """Return how a setting is fine-tuned, as on the command line."""
    task, model = cell["task"], cell["model"]
    splice = task == SPLICE
    passes = EPOCHS.get(task, 15) * (2 if cell["option"] == "long" else 1)
    passes = 1 if tiny else FEW_EPOCHS if cell["option"] == "sites" else passes
    pooling = "mean" if not splice else "attention" if model in ("hyenadna", "hyenadna-d192") else "center"
    return [
        f"seed={cell['seed']}",
        f"epochs={passes}",
        f"batch_size={128 if splice else 16 if task == NT else 32}",
        "optim.min_lr_ratio=0.01",
        "optim.warmup=0.05",
        f"head.pooling={pooling}",
        "head.dropout=0.1",
        # A site read backwards is no site; other tasks have no strand.
        f"loader.reverse_complement={str(not splice and model != 'caduceus-ps').lower()}",
        f"supervised.conjoin={'eval' if model == 'caduceus-ph' and not splice else 'none'}",
        "loader.eval_batch_size=512",
        "protocol=caduceus_cv",
        "save_every=1000000",
        "quiet=true",
        f"name={model}",
        *OPTIONS[cell["option"]],
    ]


def count_kmers(cell: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what logistic regression on k-mers gives on the same rows."""
    from genossm.data.protocols import divide
    from genossm.probe import probe_kmers

    right, counted = 0.0, 0
    for table in tables_of(cell, arguments):
        data = table.load()
        splits, _ = divide(data, "caduceus_cv", cell["seed"])
        probe = probe_kmers(splits["train"], splits["test"], data.target, methods=("linear",))[0]
        right += probe.metrics["accuracy"] * len(splits["test"])
        counted += len(splits["test"])
    return {"test/accuracy": round(right / counted, 4), "test rows": counted}


RUNNERS = {"tune": tune, "kmers": count_kmers}


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the tables: pretraining, then the mean over seeds of each setting."""
    lines = [
        "| pretraining | parameters | seconds | steps | tokens | test bits | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if row["stage"] == "pretraining" and "error" not in row:
            bits = f"{row['test/bits']:.4f}"
            every = [value for key, value in row.items() if key.startswith("test/bits of all")]
            if every:
                bits += (
                    " (all targets, random ones of 4 and of 12 ids: " + " and ".join(f"{v:.4f}" for v in every) + ")"
                )
            lines.append(
                f"| {row['name']} | {row['parameters']:,} | {row['seconds']} | {row['steps']:,} |"
                f" {row['tokens'] / 1e6:.0f} M | {bits} | {row['test/accuracy']:.4f} |"
            )
    lines += ["", "| task | model | weights | option | seeds | test accuracy | min to max | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in results:
        if row["stage"] != "pretraining" and "error" not in row:
            key = (row["task"], row["model"], row["weights"], row.get("option", ""))
            groups.setdefault(key, []).append(row)
    for (task, model, weights, option), rows in sorted(groups.items()):
        scores = [row["test/accuracy"] for row in rows]
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}" if model else ""
        lines.append(
            f"| {task} | {model or 'k-mers 1-5'} | {weights} | {option} | {len(scores)} |"
            f" {statistics.mean(scores):.4f}{spread} | {min(scores):.4f} to {max(scores):.4f} | {seconds} |"
        )
    failed = [f"- {row['name']}: {row['error']}" for row in results if "error" in row]
    return "\n".join([*lines, *(["", "Failed:", *failed] if failed else [])]) + "\n"


def averages(folder: Path) -> str:
    """Return the accuracy of the mean of the probabilities of the runs of each setting, and of all fresh ones."""
    import numpy as np
    import pandas as pd

    groups: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(file)
        names = [file.stem.partition("_seed")[0], *(["all fresh"] if "_fresh_" in file.stem else [])]
        for name in names:
            groups.setdefault(name, []).append(frame)
    lines = ["", "| mean of the runs of | runs | test accuracy |", "|---|---|---|"]
    for name, frames in groups.items():
        classes = np.array(frames[0].columns[4:])
        mean = np.mean([frame[classes].to_numpy() for frame in frames], axis=0)
        right = (classes[mean.argmax(1)] == frames[0]["target"].to_numpy()).mean()
        lines.append(f"| {name} | {len(frames)} | {right:.4f} |")
    return "\n".join(lines) + "\n" if groups else ""


if __name__ == "__main__":
    main()
