"""Run a whole contig through a causal recurrent model in constant memory, and check that nothing is lost on the way.

python scripts/stream_contig.py --fasta human_GRCh37_chr20.fa.gz --contig 20 --model RUN/model

Takes the contig's first --bases bases from the first that is not N on, gives bits per base and the peak of resident
memory at ten marks, and compares hidden states with two other ways: the first --check bases in one call, and the last
--check bases in pieces of another size from the state that was saved before them. Without a model it is a fresh Mamba
of 4 layers, d128, whose bits mean nothing.
"""

import argparse
import math
import resource
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.checkpoint import load
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.tokenizer import tokenizer_named
from genossm.models.base import Backbone, State
from genossm.models.mamba import MambaConfig


def main() -> None:
    """Stream the contig and print what it costs and how exact it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--contig", required=True)
    parser.add_argument("--model", help="a folder; none is a fresh Mamba")
    parser.add_argument("--bases", type=int, default=10_000_000)
    parser.add_argument("--piece", type=int, default=1024)
    parser.add_argument("--check", type=int, default=65_536)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MambaConfig().build().eval() if options.model is None else load(options.model).eval()
    codes_L = Genome(options.fasta).codes(options.contig)
    first = int(np.argmax((codes_L & 0x7F) != alphabet.N))
    codes_L = codes_L[first : first + options.bases]
    ids_BL = torch.from_numpy(tokenizer_named(model.config.tokenizer).from_codes(codes_L))[None]
    print(
        f"{options.contig}: {ids_BL.shape[1]:,} bases from 0-based position {first:,}; peak {peak_mib():.0f} MiB before"
    )
    with torch.inference_mode():
        head_BLD, tail_BLD, state = stream(model, ids_BL, options.piece, options.check)
        whole_BLD, _ = model.extend(ids_BL[:, : options.check], model.init_state(1))
        rest_BLD = torch.cat(pieces(model, ids_BL[:, -options.check :], 777, state), dim=1)
    for name, got, wanted in (
        ("first, in one call", head_BLD, whole_BLD),
        ("last, in other pieces", tail_BLD, rest_BLD),
    ):
        apart = float((got - wanted).abs().max())
        print(
            f"{options.check:,} {name}: largest difference {apart:.1e} of values up to {float(wanted.abs().max()):.1f}"
        )


def stream(model: Backbone, ids_BL: Tensor, piece: int, check: int) -> tuple[Tensor, Tensor, State]:
    """Return the hidden states of the first and of the last bases, and the state before the latter."""
    length = ids_BL.shape[1]
    state = saved = model.init_state(1)
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    nats, counted, began = 0.0, 0, time.perf_counter()
    start = 0
    for mark in sorted({*(length * tenth // 10 for tenth in range(1, 11)), length - check}):
        for piece_BL in ids_BL[:, start:mark].split(piece, dim=1):
            x_BLD, state = model.extend(piece_BL, state)
            end = start + piece_BL.shape[1]
            for place, wanted in enumerate((start < check, start >= length - check)):
                if wanted:
                    kept[place].append(x_BLD)
            targets_L = ids_BL[0, start + 1 : end + 1].long()
            counts_L = (targets_L >= alphabet.A) & (targets_L <= alphabet.T)
            logits_LV = model.logits(x_BLD)[0, : len(targets_L)][counts_L]
            nats += float(F.cross_entropy(logits_LV, targets_L[counts_L], reduction="sum"))
            counted += int(counts_L.sum())
            start = end
        if mark == length - check:
            saved = state
        seconds = time.perf_counter() - began
        bits = nats / max(1, counted) / math.log(2)
        print(
            f"{mark:>11,} bases  {bits:.3f} bits/base  {mark / seconds:,.0f} bases/s  peak {peak_mib():.0f} MiB",
            flush=True,
        )
    head_BLD, tail_BLD = (torch.cat(parts, dim=1) for parts in kept)
    return head_BLD[:, :check], tail_BLD, saved


def pieces(model: Backbone, ids_BL: Tensor, piece: int, state: State) -> list[Tensor]:
    """Return the hidden states of successive pieces after a state."""
    states: list[Tensor] = []
    for piece_BL in ids_BL.split(piece, dim=1):
        x_BLD, state = model.extend(piece_BL, state)
        states.append(x_BLD)
    return states


def peak_mib() -> float:
    """Return the highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
