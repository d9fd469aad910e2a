"""Runs verbs that are killed and started again: `python killed.py FOLDER`, with model, g.fa, v.vcf, r.bed in it.

One process imports everything and forks for each run, so that a run costs no import. For each verb: a run to its end,
one that is killed three times in the middle, and one of two ranks as torchrun starts them, all of small parts.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pyarrow.parquet  # noqa: F401
import torch

import genossm.embed
import genossm.ism
import genossm.score

genossm.embed._PART_BASES = 512
genossm.score._PART_ALLELES = 2
genossm.ism._PART_POSITIONS = 4


def start(verb: str, folder: Path, out: Path, environment: dict[str, str]) -> int:
    """Start a verb in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    code = 1
    try:
        model, genome = folder / "model", folder / "g.fa"
        if verb == "embed":
            genossm.embed.embed(model, fasta=genome, out=out, window=8, batch_size=2)
        elif verb == "score":
            genossm.score.score(model, vcf=folder / "v.vcf", genome=genome, out=out, window=64, methods=["llr", "l2"])
        else:
            genossm.ism.ism(model, bed=folder / "r.bed", genome=genome, out=out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(*children: int) -> None:
    """Wait until forks have ended well."""
    for child in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            sys.exit(f"process {child} failed")


def kill_after(parts: int, child: int, out: Path) -> None:
    """Kill a fork with no chance to clean up once it has written more than so many parts."""
    deadline = time.monotonic() + 60
    while len(list(out.with_name(f"{out.name}.parts").glob("part-*"))) <= parts and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or out.exists():
        sys.exit(f"{out} was there before the kill after {parts} parts")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # What the first call imports and compiles is done once, on one thread, so that forks can follow.
    genossm.embed.embed(folder / "model", fasta=folder / "g.fa", window=3000)
    genossm.score.score(folder / "model", vcf=folder / "v.vcf", genome=folder / "g.fa", window=64)
    for verb, ending in (("embed", "parquet"), ("score", "vcf.gz"), ("ism", "bedgraph")):
        finish(start(verb, folder, folder / f"{verb}-whole.{ending}", {}))
        killed = folder / f"{verb}-killed.{ending}"
        for parts in (0, 2, 4):
            kill_after(parts, start(verb, folder, killed, {}), killed)
        finish(start(verb, folder, killed, {}))
        ranks = folder / f"{verb}-ranks.{ending}"
        finish(*(start(verb, folder, ranks, {"WORLD_SIZE": "2", "RANK": rank}) for rank in "01"))
