"""`genossm.ism` beside the bare forward passes of as many mutated sequences."""

from collections.abc import Mapping

import numpy as np
import torch

from genossm.benchmarks.base import Comparison, Run
from genossm.data.datamodule import bundled
from genossm.dna.genome import Genome
from genossm.effects import Effects
from genossm.inference import TOKENS, opened
from genossm.models.base import BackboneConfig
from genossm.models.cnn import CNNConfig
from genossm.models.hyenadna import HyenaDNAConfig

LENGTH, POSITIONS = 10_000, 64


def comparisons(device: torch.device) -> list[Comparison]:
    """Return one comparison of a model that costs next to nothing, and one of a real one."""
    tiny = CNNConfig(d_model=4, n_layer=1, causal=True)
    return [
        compare("CNN", tiny, device),
        compare("HyenaDNA", HyenaDNAConfig(d_model=64, max_length=LENGTH + 2), device),
    ]


def compare(name: str, config: BackboneConfig, device: torch.device) -> Comparison:
    """Compare the 192 substitutions at 64 positions of 10 kb with 192 forward passes and log-likelihoods."""

    def build() -> Mapping[str, Run]:
        torch.manual_seed(0)
        model = config.build().to(device).eval()
        genome = Genome(bundled("fa.gz"))
        codes = genome.codes(next(iter(genome.contigs)))[:LENGTH] & np.uint8(0x7F)
        rows = TOKENS[device.type] // LENGTH
        ids_BL = torch.from_numpy(codes).repeat(rows, 1).to(device)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(3 * POSITIONS // rows):
                model.logits(model(ids_BL))

        def mutate() -> None:
            with opened(model) as ready:
                Effects(ready, ["llr"]).substitutions(codes, range(POSITIONS))

        return {"bare model": bare, "genossm.ism": mutate}

    title = f"{name} d{config.d_model} x {config.n_layer}, {3 * POSITIONS} mutated sequences of 10 kb"
    return Comparison(name=title, build=build, tokens=3 * POSITIONS * LENGTH)
