"""Training and inference of whole models beside the published code's order of operations."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.benchmarks.base import Comparison, Run
from genossm.benchmarks.published import PublishedHyenaDNA
from genossm.models.hyenadna import HyenaDNA, HyenaDNAConfig
from genossm.nn.hyena import HyenaFilter
from genossm.optim import Optim


def comparisons(device: torch.device) -> list[Comparison]:
    """Return the comparisons of training steps and of inference."""
    return [training_step(device), *(inference(device, length) for length in (16_384, 160_000, 1_000_000))]


def training_step(device: torch.device, batch: int = 8, length: int = 1024) -> Comparison:
    """Compare one AdamW step of the default HyenaDNA (d128 x 2) on the same tokens."""

    def build() -> Mapping[str, Run]:
        ids_BL = torch.randint(7, 11, (batch, length), dtype=torch.uint8, device=device)

        def steps(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Run:
            optimizer = Optim().build(model)

            def step() -> None:
                loss = F.cross_entropy(logits(ids_BL).flatten(0, 1), ids_BL.long().flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            return step

        theirs = PublishedHyenaDNA(build_model(device, length + 2).train())
        ours = build_model(device, length + 2).train()
        return {"published form": steps(theirs, theirs), "genossm": steps(ours, lambda ids: ours.logits(ours(ids)))}

    return Comparison(name=f"HyenaDNA d128 x 2, training step {batch} x {length:,}", build=build, tokens=batch * length)


def inference(device: torch.device, length: int) -> Comparison:
    """Compare the logits of one long sequence; at a million bases ours alone on a CPU: the other takes 10 GiB.

    The CPU keeps the filters' transforms from the second input of a length on, where they have room; a fresh model, the
    same weights anew before each run, shows what the first input takes.
    """
    cpu = device.type == "cpu"
    alone = cpu and length >= 1_000_000
    built: list[HyenaDNA] = []

    def build() -> Mapping[str, Run]:
        ids_BL = torch.randint(7, 11, (1, length), dtype=torch.uint8, device=device)
        ours, fresh = (build_model(device, length + 2) for _ in range(2))
        built[:] = [ours]

        @torch.inference_mode()
        def first() -> Tensor:
            for filters in filters_of(fresh):
                filters.forget()
            return fresh.logits(fresh(ids_BL))

        fast = torch.inference_mode()(lambda: ours.logits(ours(ids_BL)))
        if alone:
            return {"genossm": fast}
        published = torch.inference_mode()(PublishedHyenaDNA(ours))
        named: dict[str, Run] = {"published form": lambda: published(ids_BL), "genossm": fast}
        return named | ({"genossm, first input": first} if cpu else {})

    return Comparison(
        name=f"HyenaDNA d128 x 2, inference 1 x {length:,}",
        build=build,
        tokens=length,
        held=lambda: sum(filters.spectrum_bytes for model in built for filters in filters_of(model)) / 2**20,
        targets={"genossm": {160_000: "2x", 1_000_000: "2,560 MiB"}.get(length, "")} if cpu else {},
    )


def filters_of(model: HyenaDNA) -> list[HyenaFilter]:
    """Return the long filters of a model."""
    return [module for module in model.modules() if isinstance(module, HyenaFilter)]


def build_model(device: torch.device, max_length: int) -> HyenaDNA:
    """Return the default HyenaDNA with fresh weights, in eval mode."""
    torch.manual_seed(0)
    return HyenaDNAConfig(max_length=max_length).build().to(device).eval()
