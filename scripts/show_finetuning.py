"""Measure on a GPU: pretraining on human chr20, then splice sites from fresh and from pretrained weights.

    python scripts/show_finetuning.py --chr20 human_GRCh37_chr20.fa.gz --splice human_chr20_splice_400.tsv.gz --out DIR

Pretraining sees random 1,024-bp windows of 0.06-48 Mb and is tested on 2,048 fixed windows of 50.0-62.9 Mb, in which
all test sites lie. Each splice run has the same epochs, batches and best-validation rule; 10 % of train, drawn by the
seed, is validation, and test is looked at once. Prints one table and writes DIR/results.json after every run, so that
what is done is kept when time runs out.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "hyenadna": {"model_type": "hyenadna", "d_model": 128, "n_layer": 2},
    "hyenadna-both": {"model_type": "hyenadna", "d_model": 128, "n_layer": 2, "bidirectional": True},
    "caduceus-ph": {"model_type": "caduceus", "d_model": 118, "n_layer": 4},
    "caduceus-ps": {"model_type": "caduceus", "d_model": 118, "n_layer": 4, "rcps": True},
    "transformer": {"model_type": "transformer", "d_model": 128, "n_layer": 4, "n_head": 4, "causal": False},
    "cnn": {"model_type": "cnn", "d_model": 96, "n_layer": 6, "causal": False},
}
"""The small shape of each backbone; HyenaDNA and Caduceus have the sizes of the published 1k models."""

PRETRAINED = {"hyenadna": 1.2e-3, "caduceus-ph": 4e-3}
"""What is pretrained, and the peak learning rate."""

LENGTH = 1024


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chr20", type=Path, help="FASTA of human chr20 (GRCh37)")
    parser.add_argument("--splice", type=Path, required=True, help="table of splice sites")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the pretrained models")
    parser.add_argument("--pretrain-seconds", type=float, default=110.0, help="of training, a model; 0 skips it")
    parser.add_argument("--rows", type=int, default=256, help="windows of a pretraining batch")
    parser.add_argument("--windows", type=int, default=2048, help="windows of the pretraining test")
    parser.add_argument("--epochs", type=float, default=20, help="of each splice run")
    parser.add_argument("--cell-seconds", type=int, default=150, help="of training, at most, of each splice run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting")
    parser.add_argument("--jobs", type=int, default=4, help="splice runs at a time on the one GPU")
    parser.add_argument("--only", nargs="*", help="names of the splice settings to run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    if arguments.pretrain_seconds > 0 and arguments.chr20:
        for name, rate in PRETRAINED.items():
            results.append(pretrain(name, rate, arguments))
            keep(results, arguments.out)
    fine_tune_all(arguments, results)
    keep(results, arguments.out)
    show(results)


def keep(results: list[dict[str, Any]], folder: Path) -> None:
    """Write all results so far."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def pretrain(name: str, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a backbone on chr20 for about the seconds given and measure it on the held-out end."""
    import lightning as L
    import torch

    from genossm import checkpoint
    from genossm.data.datamodule import GenomeWindows
    from genossm.models.base import config_from_dict
    from genossm.optim import Optim
    from genossm.tasks.causal_lm import CausalLM
    from genossm.tasks.masked_lm import MaskedLM
    from genossm.train import build_trainer

    bed = arguments.out / "chr20.bed"
    bed.write_text("20\t60000\t48000000\ttrain\n20\t48500000\t49500000\tval\n20\t50000000\t62900000\ttest\n")
    L.seed_everything(1, verbose=False)
    shape = SHAPES[name] | ({"max_length": LENGTH + 2} if name == "hyenadna" else {})
    model = config_from_dict(shape).build()
    optim = Optim(lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    task_class = CausalLM if model.causal else MaskedLM

    def build_data(steps: int) -> tuple[Any, GenomeWindows]:
        task = task_class(model, optim, steps)
        data = GenomeWindows(
            str(arguments.chr20),
            str(bed),
            length=LENGTH,
            batch_size=arguments.rows,
            eval_windows=arguments.windows,
            num_workers=6 if torch.cuda.is_available() else 0,
            seed=1,
            objective=task.objective,
            batches=steps,
        )
        return task, data

    task, data = build_data(1)
    data.setup()
    seconds_a_step = time_steps(task, data)
    model = config_from_dict(shape).build()
    steps = max(2, round(arguments.pretrain_seconds / seconds_a_step))
    task, data = build_data(steps)
    values = {
        "accelerator": "auto",
        "devices": 1,
        "strategy": "auto",
        "val_check_interval": steps,
        "precision": "auto",
        "max_steps": steps,
        "gradient_clip_val": 1.0,
    }
    values |= {"accumulate_grad_batches": 1, "limit_val_batches": 0, "log_every_n_steps": 50}
    trainer = build_trainer(values, [], [])
    began = time.monotonic()
    trainer.fit(task, datamodule=data)
    seconds = time.monotonic() - began
    metrics = trainer.test(task, datamodule=data, verbose=False)[0]
    checkpoint.save(model, arguments.out / name, {"seconds": seconds, **metrics})
    return {
        "stage": "pretraining",
        "model": name,
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * LENGTH * arguments.rows,
        "seconds": round(seconds, 1),
        "bits": round(metrics["test/bits"], 4),
        "accuracy": round(metrics["test/accuracy"], 4),
    }


def time_steps(task: Any, data: Any) -> float:
    """Return the seconds of a training step, kernels compiled; the weights of `task` are spent."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {key: value.to(device) for key, value in data.train_dataloader().dataset[0].items()}
    task = task.to(device)
    task.log_dict = lambda *_: None
    optimizer = task.configure_optimizers()["optimizer"]
    times: list[float] = []
    for step in range(30 if device.type == "cuda" else 3):
        began = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task.training_step(batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    # Lightning's own work and the loader come on top.
    return 1.08 * sorted(times)[len(times) // 2] + 0.001


def settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the splice runs: fresh weights of each backbone, then pretrained ones beside the same head."""
    both = ["head.pooling=center"]
    runs = [
        {"name": f"{name}, center", "model": name, "overrides": both, "rate": 2e-3}
        for name in ("caduceus-ph", "caduceus-ps", "hyenadna-both", "transformer", "cnn")
    ]
    runs.append({"name": "hyenadna, attention", "model": "hyenadna", "overrides": ["head.pooling=attention"]})
    if (arguments.out / "caduceus-ph").exists():
        runs.append({"name": "caduceus-ph pretrained, center", "model": "caduceus-ph", "overrides": both, "rate": 1e-3})
    if (arguments.out / "hyenadna").exists():
        overrides = ["head.pooling=attention"]
        runs.append({"name": "hyenadna pretrained, attention", "model": "hyenadna", "overrides": overrides})
    runs = [run for run in runs if not arguments.only or run["name"] in arguments.only]
    return [{"rate": 1e-3, **run, "seed": seed} for seed in range(1, arguments.seeds + 1) for run in runs]


def fine_tune_all(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run the splice settings, several at a time; one that fails is noted and the rest goes on."""
    os.environ["OMP_NUM_THREADS"] = "2"
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(fine_tune, run, vars(arguments)): run for run in settings(arguments)}
        for done in as_completed(running):
            run = running[done]
            error = done.exception()
            found = {"error": f"{type(error).__name__}: {error}"} if error is not None else done.result()
            results.append({"stage": "splice", **run, **found})
            print(results[-1], flush=True)
            keep(results, arguments.out)


def fine_tune(run: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Run one setting and return what was measured."""
    import torch

    from genossm import checkpoint
    from genossm.data.table import Table
    from genossm.finetune import finetune
    from genossm.models.base import config_from_dict

    folder = arguments["out"] / run["model"]
    if "pretrained" not in run["name"]:
        torch.manual_seed(run["seed"])
        context = {"max_length": 400} if run["model"].startswith("hyenadna") else {}
        folder = Path("/tmp") / f"show_{os.getpid()}_{run['model']}"  # noqa: S108
        checkpoint.save(config_from_dict(SHAPES[run["model"]] | context).build(), folder)
    limit = arguments["cell_seconds"]
    result = finetune(
        Table(table=str(arguments["splice"])),
        folder,
        [
            f"seed={run['seed']}",
            f"epochs={arguments['epochs']}",
            "batch_size=64",
            f"optim.lr={run['rate']}",
            "optim.min_lr_ratio=0.01",
            "optim.warmup=0.05",
            "head.dropout=0.1",
            "loader.reverse_complement=false",
            "loader.eval_batch_size=512",
            "protocol=caduceus_cv",
            "save_every=1000000",
            "quiet=true",
            f"+trainer.max_time=00:00:{limit // 60:02d}:{limit % 60:02d}",
            f"output={Path('/tmp') / 'show_runs'}",  # noqa: S108
            f"name={run['model']}_{run['seed']}_{os.getpid()}",
            *run["overrides"],
        ],
    )
    kept = ("test/accuracy", "test/mcc", "val/accuracy", "seconds", "steps")
    return {
        "parameters": result.model.backbone.num_parameters(),
        **{key: round(result.metrics[key], 4) for key in kept},
        "interval": [round(x, 4) for x in result.interval],
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print one table of everything."""
    print("\n| run | seed | parameters | seconds | result |\n|---|---|---|---|---|")
    for row in results:
        if row["stage"] == "pretraining":
            value = f"{row['bits']:.4f} bits, accuracy {row['accuracy']:.4f}, {row['tokens'] / 1e6:.0f} M tokens"
            print(f"| pretraining {row['model']} | 1 | {row['parameters']:,} | {row['seconds']:.0f} | {value} |")
        elif "error" in row:
            print(f"| {row['name']} | {row['seed']} | | | {row['error'][:120]} |")
        else:
            low, high = row["interval"]
            value = f"test accuracy {row['test/accuracy']:.4f} [{low:.4f}, {high:.4f}], val {row['val/accuracy']:.4f}"
            print(f"| {row['name']} | {row['seed']} | {row['parameters']:,} | {row['seconds']:.0f} | {value} |")


if __name__ == "__main__":
    main()
