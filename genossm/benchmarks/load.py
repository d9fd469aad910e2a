"""Opening a large checkpoint, beside what safetensors takes to map the same file, and to read every byte of it."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from genossm import checkpoint, published
from genossm.benchmarks.base import Comparison, Run
from genossm.models.hyenadna import HyenaDNA, HyenaDNAConfig

CONTEXT = 1_000_002
"""Context of the largest published HyenaDNA, whose tables of positions make its file 218 MB."""


def comparisons(device: torch.device) -> list[Comparison]:
    """Return the file mapped into memory, and read: what opening costs beside it, and with the weights used."""
    return [
        Comparison(name="published, mapped", build=partial(_build, device, read=False)),
        Comparison(name="published, every byte read", build=partial(_build, device, read=True)),
        Comparison(name="ours, mapped", build=partial(_build, device, read=False, ours=True)),
    ]


def _build(device: torch.device, read: bool, ours: bool = False) -> Mapping[str, Run]:
    from safetensors.torch import load_file

    folder = Path(tempfile.mkdtemp(prefix="genossm-bench-"))
    checkpoint.save(_model(), folder) if ours else _write_published(folder)

    def by_safetensors() -> object:
        tensors = load_file(folder / "model.safetensors", device=str(device))
        return _read(tensors) if read else tensors

    def by_genossm() -> object:
        model = checkpoint.load(folder, device)
        return _read(model.state_dict()) if read else model

    # The folder goes when the benchmark's functions do.
    weakref.finalize(by_genossm, shutil.rmtree, folder, ignore_errors=True)
    return {"safetensors": by_safetensors, "genossm": by_genossm}


def _model() -> HyenaDNA:
    torch.manual_seed(0)
    return HyenaDNAConfig(d_model=256, n_layer=8, max_length=CONTEXT, tie_embeddings=False).build()


def _write_published(folder: Path) -> None:
    import json

    from safetensors.torch import save_file

    config, tensors = published.write(_model(), "hyenadna-hf")
    (folder / "config.json").write_text(json.dumps(config))
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})


def _read(tensors: Mapping[str, Tensor]) -> float:
    """Touch every byte: what is mapped is read from the file only then."""
    return sum(float(tensor.float().sum()) for tensor in tensors.values())
