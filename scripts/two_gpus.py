"""Compare one GPU with several of a host: losses and speed of DDP and FSDP2, speed of embed and score.

torchrun --standalone --nproc-per-node 2 scripts/two_gpus.py [--length 131072] [--steps 6] [--only embed score]
"""

import argparse
import gzip
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from genossm.embed import embed
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.optim import Optim
from genossm.score import score
from genossm.tasks.base import share_out

PARTS = ("training", "embed", "score")


def main() -> None:
    """Measure, in turn, one process alone and all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=6)
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
    alone = steps(build(config, device), rows_RL[:, :short], count, half=False)[0] if rank == 0 else []
    single = steps(build(config, device), rows_RL[:1], count, half=True)[1] if rank == 0 else 0.0
    if rank == 0:
        say(f"one process, batch {ranks} x {short - 1}, float32: losses {shown(alone)}")
        say(f"one process, batch 1 x {length}, bfloat16: {1e3 * single:.1f} ms a step")
    for name, wrap in wrapped.items():
        distributed.barrier()
        losses, _ = steps(wrap(build(config, device)), mine[:, :short], count, half=False)
        distributed.barrier()
        _, seconds = steps(wrap(build(config, device)), mine, count, half=True)
        losses_R = torch.tensor(losses, device=device)
        distributed.all_reduce(losses_R)
        if rank == 0:
            losses = (losses_R / ranks).tolist()
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
            say(
                f"{name}: losses {shown(losses)}, at most {apart:.1e} apart; {1e3 * seconds:.1f} ms a step,"
                f" throughput {ranks * single / seconds:.2f}x"
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


def steps(model: nn.Module, rows_BL: Tensor, count: int, half: bool) -> tuple[list[float], float]:
    """Train; return the loss of each step on these rows, and a step's median seconds."""
    optimizer = Optim(lr=1e-3).build(model)
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(count):
        began = now(rows_BL.device)
        with torch.autocast(rows_BL.device.type, torch.bfloat16, enabled=half):
            loss = model(rows_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(now(rows_BL.device) - began)
        losses.append(loss.item())
    return losses, statistics.median(seconds[1:])


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
            starts = [i * (len(bases) - width) // 63 for i in range(64)]
            bed.write_text("".join(f"{contig}\t{s}\t{s + width}\n" for s in starts))
            # Two parts of what one process scores at a time, a part for each of two; a few more to warm up with.
            write_variants(vcf, contig, bases, 2048 if device.type == "cuda" else 64)
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
            one = timed(call, f"{verb}_warm", device, alone=True)
            one = timed(call, f"{verb}_one", device, alone=True)
            distributed.barrier()
            timed(call, f"{verb}_all_warm", device, alone=False)
            every = timed(call, f"{verb}_all", device, alone=False)
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


def timed(call: Callable[[str], object], part: str, device: torch.device, alone: bool) -> float:
    """Return the seconds until every process that takes part is done; `alone`, the first one only."""
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    distributed.barrier()
    began = now(device)
    if not alone:
        call(part)
    elif rank == "0":
        os.environ["WORLD_SIZE"] = "1"
        call(part)
        os.environ["WORLD_SIZE"] = ranks
    took = now(device) - began
    distributed.barrier()
    return took if alone else now(device) - began


def shown(values: list[float]) -> str:
    """Return numbers for people."""
    return " ".join(f"{value:.5f}" for value in values)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
