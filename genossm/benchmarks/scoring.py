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
    """Return one comparison a number of alleles that share a position, on which the gain depends."""
    return [compare(alleles, device) for alleles in (1, 3)]


def compare(alleles: int, device: torch.device) -> Comparison:
    """Compare the log-likelihood ratios of 120 SNVs, `alleles` of them at each position, on the forward strand."""

    def build() -> Mapping[str, Run]:
        torch.manual_seed(0)
        model = MambaConfig(d_model=16, n_layer=1).build().to(device).eval()
        genome = Genome(bundled("fa.gz"))
        contig = next(iter(genome.contigs))
        codes = genome.codes(contig) & np.uint8(0x7F)
        places = np.linspace(WINDOW, len(codes) - WINDOW, -(-COUNT // alleles)).astype(int).tolist()
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
                    reference = codes[at - WINDOW // 2 : at + WINDOW // 2]
                    changed = reference.copy()
                    changed[WINDOW // 2] = base
                    rows += [torch.from_numpy(reference), torch.from_numpy(changed)]
                ids_BL = torch.stack(rows).to(device)
                logp_BLV = model.logits(model(ids_BL))[:, :-1].log_softmax(-1)
                logp_BLV.gather(-1, ids_BL[:, 1:, None].long()).sum((1, 2))

        return {
            "two windows a variant": independent,
            "genossm.score": lambda: score(
                model, vcf=vcf, genome=bundled("fa.gz"), window=WINDOW, strand="forward", device=device.type
            ),
        }

    title = f"Mamba d16 x 1, {COUNT:,} SNVs in windows of 8 kb, {alleles} a position"
    return Comparison(name=title, build=build, memory=False)
