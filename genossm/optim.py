"""Optimizers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("cosine", "constant", "linear")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule, computed from the number of steps of the run.

    Raises:
        ValueError: a value is impossible.
    """

    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, embeddings and what a layer lists in `NO_WEIGHT_DECAY` have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    schedule: str = "cosine"
    """After the warm-up: "cosine" or "linear" down to `min_lr_ratio`, or "constant"."""
    warmup: float = 0.01
    """Share of the steps (below 1) or number of steps over which the rate rises linearly."""
    min_lr_ratio: float = 0.1
    """Last rate over the peak."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}.")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                "optim needs lr > 0, weight_decay >= 0, warmup >= 0 and min_lr_ratio in [0, 1]; got"
                f" {self.lr}, {self.weight_decay}, {self.warmup} and {self.min_lr_ratio}."
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the rate of a step over the peak, for a run of `steps` steps."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * falling

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """Return AdamW over the trained parameters of a module, in two groups: decayed and not."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter, decays in decayed_parameters(module):
            (decayed if decays else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.lr, betas=self.betas, eps=self.eps
        )


def decayed_parameters(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each trained parameter once and whether it is decayed: matrices are, outside embeddings and lists."""
    exempt: set[nn.Parameter] = set()
    for child in module.modules():
        listed = getattr(child, "NO_WEIGHT_DECAY", ())
        if isinstance(child, nn.Embedding) or listed == "all":
            exempt.update(child.parameters())
        elif listed:
            exempt.update(parameter for name, parameter in child.named_parameters() if name in listed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            yield parameter, parameter.ndim >= 2 and parameter not in exempt
