"""`genossm.embed` beside the bare forward passes of the same sequences."""

from collections.abc import Mapping

import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.data.datamodule import bundled
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.embed import embed
from genossm.inference import TOKENS
from genossm.models.base import BackboneConfig
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.models.mamba import MambaConfig

COUNT, LENGTH = 1000, 1000


def comparisons(device: torch.device) -> list[Comparison]:
    """Return one comparison a backbone."""
    return [
        compare("HyenaDNA", HyenaDNAConfig(d_model=64, max_length=1026), device),
        compare("Mamba", MambaConfig(d_model=64, n_layer=2), device),
    ]


def compare(name: str, config: BackboneConfig, device: torch.device) -> Comparison:
    """Compare 1,000 sequences of 1 kb from text to mean vectors with the forward passes alone, in equal batches."""

    def build() -> Mapping[str, Run]:
        torch.manual_seed(0)
        model = config.build().to(device).eval()
        genome = Genome(bundled("fa.gz"))
        codes = genome.codes(next(iter(genome.contigs)))[: COUNT * LENGTH]
        texts = [alphabet.to_text(codes[first : first + LENGTH]) for first in range(0, COUNT * LENGTH, LENGTH)]
        batches = torch.from_numpy(codes & 0x7F).view(COUNT, LENGTH).to(device).split(TOKENS[device.type] // LENGTH)

        @torch.inference_mode()
        def bare() -> None:
            for ids_BL in batches:
                model(ids_BL)

        return {"bare forward": bare, "genossm.embed": lambda: embed(model, texts)}

    title = f"{name} d{config.d_model} x {config.n_layer}, {COUNT:,} x 1 kb"
    return Comparison(name=title, build=build, tokens=COUNT * LENGTH, memory=False)
