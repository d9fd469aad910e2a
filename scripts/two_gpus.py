"""Compare one GPU with several of a host: losses and speed of DDP and FSDP2, speed of embed and score.

torchrun --standalone --nproc-per-node 2 scripts/two_gpus.py [--length 131072] [--steps 24] [--only embed score]
"""

import argparse
import gzip
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from genossm.embed import embed
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.optim import Optim, clip_norm
from genossm.score import score
from genossm.tasks.base import share_out

PARTS = ("training", "embed", "score")


def main() -> None:
    """Measure, in turn, one process alone and all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=24, help="that are timed, of each kind")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    config = HyenaDNAConfig(d_model=given.width, n_layer=given.layers, max_length=given.length + 2)
    torch.manual_seed(1)
    rows_RL = torch.randint(7, 11, (ranks, given.length + 1), device=device)
    if rank == 0:
        say(f"{ranks} x {torch.cuda.get_device_name(device) if gpu else 'CPU'}, torch {torch.__version__}")
    if "training" in given.only:
        train(config, rows_RL, given.steps, device)
    verbs(config, device, given.only)
    distributed.destroy_process_group()


def train(config: HyenaDNAConfig, rows_RL: Tensor, count: int, device: torch.device) -> None:
    """Compare losses and a step's time of one process, DDP and FSDP2."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    length = rows_RL.shape[1] - 1
    mine = rows_RL[rank : rank + 1]
    wrapped: dict[str, Callable[[NextBase], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP2": shard}
    # Losses in float32, whose differences are those of the order of sums; times as training runs, in bfloat16.
    short = min(length, 16_384) + 1
    alone = losses(build(config, device), rows_RL[:, :short]) if rank == 0 else []
    single = times(build(config, device), rows_RL[:1], count) if rank == 0 else (0.0, 0.0)
    if rank == 0:
        say(f"one process, batch {ranks} x {short - 1}, float32: losses {shown(alone)}")
        say(f"one process, batch 1 x {length}, bfloat16: {in_milliseconds(single)}")
    for name, wrap in wrapped.items():
        distributed.barrier()
        losses_R = torch.tensor(losses(wrap(build(config, device)), mine[:, :short]), device=device)
        distributed.all_reduce(losses_R)
        distributed.barrier()
        several = times(wrap(build(config, device)), mine, count)
        if rank == 0:
            mean = (losses_R / ranks).tolist()
            apart = max(abs(a - b) / abs(b) for a, b in zip(mean, alone, strict=True))
            ratios = [f"{ranks * one / both:.2f}x" for one, both in zip(single, several, strict=True)]
            say(
                f"{name}: losses {shown(mean)}, at most {apart:.1e} apart; {in_milliseconds(several)}, throughput"
                f" {ratios[0]}, waiting {ratios[1]}"
            )


class NextBase(nn.Module):
    """A backbone whose forward returns its loss, so that wrappers see every use of a weight."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone

    def forward(self, row_BL: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next base."""
        logits_BLV = self.backbone.logits(self.backbone(row_BL[:, :-1]))
        return cross_entropy(logits_BLV.float().flatten(0, 1), row_BL[:, 1:].flatten())


def build(config: HyenaDNAConfig, device: torch.device) -> NextBase:
    """Return the same fresh model in every process."""
    torch.manual_seed(0)
    return NextBase(config.build()).to(device).train()


def shard(model: NextBase) -> nn.Module:
    """Share the weights out as training does."""
    share_out(model.backbone)
    return model


def stepping(model: nn.Module, rows_BL: Tensor, half: bool) -> Callable[[], Tensor]:
    """Return a function that takes a step on these rows and returns its loss."""
    optimizer = Optim(lr=1e-3).build(model)

    def step() -> Tensor:
        with torch.autocast(rows_BL.device.type, torch.bfloat16, enabled=half):
            loss: Tensor = model(rows_BL)
        loss.backward()
        clip_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def losses(model: nn.Module, rows_BL: Tensor) -> list[float]:
    """Return the losses of six steps in float32."""
    step = stepping(model, rows_BL, half=False)
    return [step().item() for _ in range(6)]


def times(model: nn.Module, rows_BL: Tensor, count: int) -> tuple[float, float]:
    """Return a step's seconds in a row of steps, as training takes them, and where each waits for the device."""
    step = stepping(model, rows_BL, half=True)
    for _ in range(3):
        step()
    rows: list[float] = []
    for _ in range(3):
        began = now(rows_BL.device)
        for _ in range(count // 3):
            step()
        rows.append((now(rows_BL.device) - began) / (count // 3))
    waiting: list[float] = []
    for _ in range(count):
        began = now(rows_BL.device)
        step()
        waiting.append(now(rows_BL.device) - began)
    return statistics.median(rows), statistics.median(waiting)


def now(device: torch.device) -> float:
    """Return the time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def verbs(config: HyenaDNAConfig, device: torch.device, wanted: Sequence[str]) -> None:
    """Compare embed and score by one process and by all, in the same folder."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    name = "human_chr20_b37_33260000-34308576.fa.gz"
    with tempfile.TemporaryDirectory() as made:
        place: list[Any] = [made]
        distributed.broadcast_object_list(place, src=0)
        folder = Path(place[0])
        fasta, bed, vcf = folder / "g.fa", folder / "w.bed", folder / "v.vcf"
        if rank == 0:
            packed = resources.files("genossm.assets").joinpath(name).read_bytes()
            fasta.write_bytes(gzip.decompress(packed))
            contig, bases = read(fasta)
            width = min(given_window(config), len(bases) // 2)
            starts = [i * (len(bases) - width) // 31 for i in range(32)]
            bed.write_text("".join(f"{contig}\t{s}\t{s + width}\n" for s in starts))
            # A few more to warm up with.
            write_variants(vcf, contig, bases, 1024 if device.type == "cuda" else 64)
            write_variants(folder / "warm.vcf", contig, bases, 64)
        distributed.barrier()
        model = build(config, device).backbone
        window = min(given_window(config), 8192)

        def embedding(part: str) -> object:
            return embed(model, bed=bed, genome=fasta, out=folder / f"{part}.npy", batch_size=1)  # type: ignore[arg-type]

        def scoring(part: str) -> object:
            given = folder / "warm.vcf" if "warm" in part else vcf
            return score(model, vcf=given, genome=fasta, out=folder / f"{part}.tsv", window=window)  # type: ignore[arg-type]

        calls = {"embed": embedding, "score": scoring}
        for verb, call in {verb: call for verb, call in calls.items() if verb in wanted}.items():
            # Every process warms up on the whole of it, lest one of them compile while it is timed.
            alone(call, f"{verb}_warm_{rank}")
            one = timed(partial(alone, call) if rank == 0 else None, f"{verb}_one", device)
            every = timed(call, f"{verb}_all", device)
            if rank == 0:
                say(f"{verb}: {one:.2f} s by one process, {every:.2f} s by {ranks}: {one / every:.2f}x")


def given_window(config: HyenaDNAConfig) -> int:
    """Return the bases of a window."""
    return config.max_length - 2


def read(fasta: Path) -> tuple[str, str]:
    """Return the name and the bases of the only sequence of a FASTA."""
    head, _, rest = fasta.read_text().partition("\n")
    return head[1:].split()[0], rest.replace("\n", "").upper()


def write_variants(path: Path, contig: str, bases: str, count: int) -> None:
    """Write single-base variants, evenly spaced."""
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for index in range(count):
        at = (index + 1) * len(bases) // (count + 2)
        if bases[at] in "ACGT":
            lines.append(f"{contig}\t{at + 1}\t.\t{bases[at]}\t{'CGTA'['ACGT'.index(bases[at])]}\t.\t.\t.")
    path.write_text("\n".join(lines) + "\n")


def timed(call: Callable[[str], object] | None, part: str, device: torch.device) -> float:
    """Return the seconds until every process that has something to do is done."""
    distributed.barrier()
    began = now(device)
    if call is not None:
        call(part)
    now(device)
    distributed.barrier()
    return now(device) - began


def alone(call: Callable[[str], object], part: str) -> object:
    """Call as a process would that torchrun has not started."""
    started = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
    try:
        return call(part)
    finally:
        os.environ.update(started)


def in_milliseconds(step: tuple[float, float]) -> str:
    """Return a step's times for people."""
    return f"{1e3 * step[0]:.1f} ms a step ({1e3 * step[1]:.1f} where each waits for the device)"


def shown(values: list[float]) -> str:
    """Return numbers for people."""
    return " ".join(f"{value:.5f}" for value in values)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
