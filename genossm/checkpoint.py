"""Models on disk: a folder with config.json (data, never code) and model.safetensors."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import genossm
from genossm.models.base import Backbone, config_from_dict
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAD = "head"
"""Key of a head in config.json and prefix of its tensors; the backbone's keep the names that they have without one."""


def save(model: Backbone | Classifier, folder: str | Path, notes: dict[str, Any] | None = None) -> Path:
    """Write a model to a folder, whole or not at all.

    Args:
        model: a backbone, or one with a head, whose shape and label names are written with it.
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
        backbone = model.backbone if isinstance(model, Classifier) else model
        tensors = backbone.state_dict()
        values = backbone.config.to_dict()
        if isinstance(model, Classifier):
            values[HEAD] = model.head.config.to_dict()
            tensors |= {f"{HEAD}.{name}": tensor for name, tensor in model.head.state_dict().items()}
        values |= {"genossm_version": genossm.__version__, "notes": notes or {}}
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        save_file(_distinct(tensors), temporary / WEIGHTS, metadata={"format": "pt"})
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
    """Open a backbone that `save` wrote; a head that was saved with it is left out.

    Args:
        source: the folder.
        device: where the weights go.

    Returns:
        The backbone, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: config.json is none, or the weights don't fit it; the message names every key.
    """
    values, tensors, folder = _read(source, device)
    model = config_from_dict({key: value for key, value in values.items() if key != HEAD}).build().to(device)
    load_weights(model, {name: t for name, t in tensors.items() if not name.startswith(f"{HEAD}.")}, str(folder))
    return model.eval()


def load_classifier(source: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Open a fine-tuned model that `save` wrote: the backbone, its head and the names of the answers.

    Args:
        source: the folder.
        device: where the weights go.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: the model has no head, or see `load`.
    """
    values, tensors, folder = _read(source, device)
    if HEAD not in values:
        raise ValueError(f"{folder} holds a backbone without a head; fine-tune it first, or open it with load.")
    config = HeadConfig.from_dict(values.pop(HEAD))
    model = Classifier(config_from_dict(values).build(), config).to(device)
    prefixed = {name if name.startswith(f"{HEAD}.") else f"backbone.{name}": t for name, t in tensors.items()}
    load_weights(model, prefixed, str(folder))
    return model.eval()


def _read(source: str | Path, device: str | torch.device) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
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
    return values, load_file(folder / WEIGHTS, device=str(device)), folder


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model; every key must be there, none may be left over, every shape must fit.

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
