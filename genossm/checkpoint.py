"""Models on disk: a folder with config.json (data, never code) and model.safetensors."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import genossm
from genossm.models.base import Backbone, config_from_dict

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: Backbone, folder: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write a backbone to a folder, whole or not at all.

    Args:
        model: the backbone.
        folder: where config.json and model.safetensors go; an older model there is replaced.
        notes: what else config.json should say, under `notes` (training data, metrics); plain values.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        values = {**model.config.to_dict(), "genossm_version": genossm.__version__, "notes": notes or {}}
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        save_file(_distinct(model.state_dict()), temporary / WEIGHTS, metadata={"format": "pt"})
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(source: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Open a backbone that `save` wrote.

    Args:
        source: the folder.
        device: where the weights go.

    Returns:
        The backbone, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: config.json is none, or the weights don't fit it; the message names every key.
    """
    from safetensors.torch import load_file

    folder = Path(source).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no genossm model: it has no {name}.")
    try:
        values = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}.") from None
    values = {key: value for key, value in values.items() if key not in ("genossm_version", "notes")}
    model = config_from_dict(values).build().to(device)
    load_weights(model, load_file(folder / WEIGHTS, device=str(device)), str(folder))
    return model.eval()


def load_weights(model: Backbone, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a backbone; every key must be there, none may be left over, every shape must fit.

    Raises:
        ValueError: it names the keys and shapes that don't fit.
    """
    expected = _distinct(model.state_dict())
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; … ({len(problems)} in all)" if len(problems) > 20 else "")
        raise ValueError(f"The weights of {source} don't fit its config: {shown}.")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the second names of shared tensors."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            kept[name] = tensor
        seen.add(identity)
    return kept
