"""One more base after contexts of growing length: a step of each backbone, and HyenaDNA's beside its prefix again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genossm.benchmarks.base import Comparison, Run
from genossm.inference import extend, state_bytes
from genossm.models.base import config_from_dict

CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)
STEPS = 128
AGAIN, STEP = "whole prefix again", "step by step"
SHAPES: dict[str, dict[str, Any]] = {
    "Mamba": {"model_type": "mamba", "d_model": 128, "n_layer": 4},
    "StripedHyena, convolutions": {"model_type": "striped_hyena", "attn_layer_idx": []},
    "StripedHyena, 1 of 4 attention": {"model_type": "striped_hyena"},
    "HyenaDNA": {"model_type": "hyenadna", "d_model": 128, "n_layer": 2, "max_length": CONTEXTS[-1] + 64 * STEPS},
    "Transformer": {"model_type": "transformer", "d_model": 128, "n_layer": 2, "n_head": 2},
}


def comparisons(device: torch.device) -> list[Comparison]:
    """Return one comparison a backbone and context; a run is 128 steps."""
    made: list[Comparison] = []
    for name in SHAPES:
        for context in CONTEXTS:
            stream = Stream(name, context, device)
            made.append(
                Comparison(
                    name=f"{name} {context}",
                    build=stream.build,
                    tokens={AGAIN: 1, STEP: STEPS},
                    memory=False,
                    held=stream.held,
                )
            )
    return made


class Stream:
    """A model that has read a context and goes on base by base.

    Args:
        name: of `SHAPES`.
        context: tokens that it has read.
        device: where it runs.
    """

    def __init__(self, name: str, context: int, device: torch.device):
        self.name, self.context, self.device = name, context, device
        self.state: Any = None

    def held(self) -> float:
        """Return the MiB of the state after the steps."""
        return state_bytes(self.state) / 2**20

    def build(self) -> Mapping[str, Run]:
        """Read the context; for HyenaDNA running the whole prefix again is the first variant."""
        torch.manual_seed(0)
        model = config_from_dict(SHAPES[self.name]).build().to(self.device).eval()
        ids_BL = torch.randint(7, 11, (1, self.context), device=self.device)
        with torch.inference_mode():
            _, self.state = extend(model, ids_BL, model.init_state(1))

        def pick(x_BD: Tensor) -> Tensor:
            return 7 + model.logits(x_BD)[:, 7:11].argmax(-1)

        @torch.inference_mode()
        def step() -> None:
            ids_B = ids_BL[:, -1]
            for _ in range(STEPS):
                x_BD, self.state = model.step(ids_B, self.state)
                ids_B = pick(x_BD)

        @torch.inference_mode()
        def again() -> None:
            pick(model(ids_BL)[:, -1])

        return {AGAIN: again, STEP: step} if self.name == "HyenaDNA" else {STEP: step}
