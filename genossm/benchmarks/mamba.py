"""Selective scans and Mamba on this device beside what transformers runs where mamba-ssm's kernels are missing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genossm.benchmarks.base import Comparison, Run
from genossm.models.mamba import MambaConfig, MambaLM
from genossm.ops.backend import installed, use_backend
from genossm.ops.selective_scan import selective_scan


def comparisons(device: torch.device) -> list[Comparison]:
    """Return the comparisons of scans, of inference, and of a sequence that only a carried state can take."""
    return [
        scan(device, length=8192, backward=False),
        scan(device, length=1024, backward=True),
        inference(device, length=16_384),
        streaming(device, length=1_000_000),
    ]


def scan(device: torch.device, length: int, backward: bool, width: int = 512, states: int = 16) -> Comparison:
    """Compare the scan with gate, skip and softplus; transformers' is quadratic in the length when it trains."""

    def build() -> Mapping[str, Run]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device).requires_grad_(backward)

        u, z = draw(1, length, width), draw(1, length, width)
        # Steps and rates as a fresh layer draws them.
        dt, bias = draw(1, length, width), torch.full((width,), -4.0, device=device, requires_grad=backward)
        B, C, D = draw(1, length, states), draw(1, length, states), draw(width)
        A = -torch.arange(1.0, states + 1, device=device).repeat(width, 1)
        A.requires_grad_(backward)
        inputs = [u, dt, A, B, C, D, z, bias]

        def run(y: Tensor) -> object:
            return torch.autograd.grad(y, inputs, torch.ones_like(y)) if backward else y

        def plain() -> object:
            with use_backend("torch"):
                return run(selective_scan(*inputs))

        def theirs() -> object:
            from transformers.models.mamba.modeling_mamba import mamba_selective_scan

            turned = (tensor.transpose(1, 2) for tensor in (u, dt))
            y = mamba_selective_scan(
                *turned, A, B.transpose(1, 2), C.transpose(1, 2), D, z.transpose(1, 2), bias, delta_softplus=True
            )
            return run(y[0] if isinstance(y, tuple) else y)

        ours: dict[str, Run] = {"genossm": lambda: run(selective_scan(*inputs)), "genossm, plain torch": plain}
        return {"transformers": theirs, **ours} if installed("transformers") else ours

    kind = "forward + backward" if backward else "forward"
    return Comparison(
        name=f"selective scan, {width} x {length:,}, {kind}",
        build=build,
        tokens=length,
        once=("transformers",) if backward else (),
        targets=on_cpu(
            device,
            {"genossm": "500x", "genossm, plain torch": "100x"}
            if backward
            # The memory is 1.3 times that of the result.
            else {"genossm": f"20x, {1.3 * 4 * width * length / 2**20:.0f} MiB", "genossm, plain torch": "7x"},
        ),
    )


def inference(device: torch.device, length: int) -> Comparison:
    """Compare the logits of one sequence under the smallest Mamba of the Caduceus paper."""

    def build() -> Mapping[str, Run]:
        ids_BL = torch.randint(7, 11, (1, length), device=device)
        model = build_model(device)
        ours = torch.inference_mode()(lambda: model.logits(model(ids_BL)))
        if not installed("transformers"):
            return {"genossm": ours}
        other = build_transformers(model).to(device)
        theirs = torch.inference_mode()(lambda: other(ids_BL, use_cache=False).logits)
        return {"transformers": theirs, "genossm": ours}

    return Comparison(
        name=f"Mamba d128 x 4, inference 1 x {length:,}",
        build=build,
        tokens=length,
        targets=on_cpu(device, {"genossm": "10x"}),
    )


def streaming(device: torch.device, length: int) -> Comparison:
    """Measure the logits of a sequence of a million bases, made and dropped piece by piece."""

    def build() -> Mapping[str, Run]:
        ids_BL = torch.randint(7, 11, (1, length), dtype=torch.uint8, device=device)
        model = build_model(device)

        def run() -> object:
            return sum(float(model.logits(x_BLD)[:, -1].max()) for x_BLD in model.stream(ids_BL))

        with torch.inference_mode():
            # Kernels are compiled by a short sequence.
            for _ in model.stream(ids_BL[:, :1000]):
                pass
        return {"genossm, streamed": torch.inference_mode()(run)}

    return Comparison(
        name=f"Mamba d128 x 4, streamed 1 x {length:,}",
        build=build,
        tokens=length,
        once=("genossm, streamed",),
        targets=on_cpu(device, {"genossm, streamed": "150 MiB"}),
    )


def on_cpu(device: torch.device, targets: Mapping[str, str]) -> Mapping[str, str]:
    """Return targets that are the CPU's, or none on another device."""
    return targets if device.type == "cpu" else {}


def build_model(device: torch.device) -> MambaLM:
    """Return the default Mamba with fresh weights, in eval mode."""
    torch.manual_seed(0)
    return MambaConfig().build().to(device).eval()


def build_transformers(model: MambaLM) -> Any:
    """Return transformers' Mamba of the same shape, in eval mode."""
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    config = model.config
    shape = TheirConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.d_model, state_size=16, num_hidden_layers=config.n_layer
    )
    return MambaForCausalLM(shape).eval()
