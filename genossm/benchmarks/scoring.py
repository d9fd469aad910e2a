"""`genossm.score` with a recurrent model beside two independent full windows a variant."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.data.datamodule import bundled
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.inference import TOKENS
from genossm.models.mamba import MambaConfig
from genossm.score import score

COUNT, WINDOW = 120, 8192
APART, GRID = 100, 512


def comparisons(device: torch.device) -> list[Comparison]:
    """Return one comparison a number of alleles at a position, on which the gain depends, and one of shared windows."""
    return [compare(1, device), compare(3, device), compare(1, device, apart=APART, grid=GRID)]


def compare(alleles: int, device: torch.device, apart: int | None = None, grid: int = 1) -> Comparison:
    """Compare the log-likelihood ratios of 120 SNVs on the forward strand.

    Args:
        alleles: how many of them stand at each position.
        device: where.
        apart: bases between positions; None spreads them over the contig.
        grid: see `genossm.score.score`.
    """

    def build() -> Mapping[str, Run]:
        torch.manual_seed(0)
        model = MambaConfig(d_model=16, n_layer=1).build().to(device).eval()
        genome = Genome(bundled("fa.gz"))
        contig = next(iter(genome.contigs))
        codes = genome.codes(contig) & np.uint8(0x7F)
        count = -(-COUNT // alleles)
        last = len(codes) - WINDOW if apart is None else WINDOW + (count - 1) * apart
        places = np.linspace(WINDOW, last, count).astype(int).tolist()
        variants = [
            (at, base)
            for at in places
            for base in [b for b in range(alphabet.A, alphabet.N) if b != codes[at]][:alleles]
        ][:COUNT]
        vcf = Path(tempfile.mkdtemp(prefix="genossm-bench-")) / "snv.vcf"
        letters = {base: "ACGT"[base - alphabet.A] for base in range(alphabet.A, alphabet.N)}
        records = [f"{contig}\t{at + 1}\t.\t{letters[int(codes[at])]}\t{letters[base]}\n" for at, base in variants]
        vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(records))
        together = max(1, TOKENS[device.type] // (2 * WINDOW))

        @torch.inference_mode()
        def independent() -> None:
            for first in range(0, COUNT, together):
                rows: list[torch.Tensor] = []
                for at, base in variants[first : first + together]:
                    start = (at - WINDOW // 2) // grid * grid
                    reference = codes[start : start + WINDOW]
                    changed = reference.copy()
                    changed[at - start] = base
                    rows += [torch.from_numpy(reference), torch.from_numpy(changed)]
                ids_BL = torch.stack(rows).to(device)
                logp_BLV = model.logits(model(ids_BL))[:, :-1].log_softmax(-1)
                logp_BLV.gather(-1, ids_BL[:, 1:, None].long()).sum((1, 2))

        return {
            "two windows a variant": independent,
            "genossm.score": lambda: score(
                model, vcf=vcf, genome=bundled("fa.gz"), window=WINDOW, grid=grid, strand="forward", device=device.type
            ),
        }

    title = f"Mamba d16 x 1, {COUNT:,} SNVs in windows of 8 kb, {alleles} a position"
    if apart is not None:
        title += f", {apart} bp apart, windows on a grid of {grid} bp"
    return Comparison(name=title, build=build, memory=False)
