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


def comparisons(device: torch.device) -> list[Comparison]:
    """Return one comparison a number of alleles at a position and a distance, on both of which the gain depends."""
    shapes: list[tuple[int, int, int | None]] = [(1, 1000, None), (1, 100, None), (3, 1, None), (1, 8000, None)]
    shapes += [(1, 1000, 1), (3, 1, 1)]
    return [compare(alleles, apart, grid, device) for alleles, apart, grid in shapes]


def compare(alleles: int, apart: int, grid: int | None, device: torch.device) -> Comparison:
    """Compare the log-likelihood ratios of 120 SNVs on the forward strand.

    Args:
        alleles: how many of them stand at each position.
        apart: bases between positions.
        grid: see `genossm.score.score`; None is its default, 1 centres each window.
        device: where.
    """

    def build() -> Mapping[str, Run]:
        torch.manual_seed(0)
        model = MambaConfig(d_model=16, n_layer=1).build().to(device).eval()
        genome = Genome(bundled("fa.gz"))
        contig = next(iter(genome.contigs))
        codes = genome.codes(contig) & np.uint8(0x7F)
        count = -(-COUNT // alleles)
        places = [WINDOW + number * apart for number in range(count)]
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
                    start = at - WINDOW // 2
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

    title = f"{COUNT:,} SNVs in windows of 8 kb, {alleles} a position, {apart:,} bp apart"
    return Comparison(name=title + (", centred" if grid == 1 else ""), build=build, memory=False)
