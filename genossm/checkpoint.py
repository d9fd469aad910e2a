"""Models on disk: a folder with config.json (data, never code) and model.safetensors."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import genossm
from genossm import published
from genossm.files import write_folder_atomically
from genossm.layouts.base import PublishedConfig, labelled
from genossm.models.base import Backbone, config_from_dict
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.source import find
from genossm.weights import assign, no_weights

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAD = "head"
"""Key of a head in config.json and prefix of its tensors; the backbone's keep the names that they have without one."""
_CLASSIFIER = "GenossmForSequenceClassification"


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
    backbone = model.backbone if isinstance(model, Classifier) else model
    tensors = backbone.state_dict()
    values = backbone.config.to_dict()
    if isinstance(model, Classifier):
        values[HEAD] = model.head.config.to_dict()
        tensors |= {f"{HEAD}.{name}": tensor for name, tensor in model.head.state_dict().items()}
    values |= {"genossm_version": genossm.__version__, "notes": notes or {}}

    def write(temporary: Path) -> None:
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        save_file(_distinct(tensors), temporary / WEIGHTS, metadata={"format": "pt"})

    write_folder_atomically(folder, write)
    return folder


def load(source: str | Path, device: str | torch.device = "cpu", revision: str | None = None) -> Backbone:
    """Open a backbone: one of ours, also as it was written for transformers, or a published checkpoint of a family that
    `genossm.layouts` knows.

    Every tensor is read once, mapped from its file; nothing in a file or a repository is executed.

    Args:
        source: a folder, a file of weights with config.json beside it, or a hub id (`owner/name[@revision]`). A head
            that was saved with the backbone is left out; `load_classifier` opens both.
        device: where the weights go.
        revision: a branch, tag or commit of a hub id.

    Returns:
        The backbone, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder or model, or a file of it is missing.
        ValueError: config.json is none, names something that we don't support, or the weights don't fit it; the
            message names every key.
    """
    found = find(source, revision)
    values = found.read_config()
    if not _is_ours(values):
        imported = published.read(found, device)
        if imported.classifier is not None:
            logger.info("%s has a head, which load leaves out; load_classifier opens it.", source)
        return imported.backbone
    with no_weights():
        model = config_from_dict(_shape(values)).build()
    named = _named(found.read_tensors(device), values, model)
    inside = {name.removeprefix("backbone."): t for name, t in named.items() if not name.startswith(f"{HEAD}.")}
    assign(model, inside, found.name, device)
    return model.eval()


def load_classifier(
    source: str | Path,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    pooling: str | None = None,
) -> Classifier:
    """Open a fine-tuned model, ours or published: the backbone, its head and the names of the answers.

    Args:
        source: see `load`.
        device: where the weights go.
        revision: a branch, tag or commit of a hub id.
        pooling: how the head pools, where a published config doesn't say it: Caduceus and fine-tuned HyenaDNA took it
            from the code that called them. One of `nn.head.HEAD_POOLINGS`; None keeps the file's, or that code's.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: see `load`.
        ValueError: the model has no head, or see `load`.
    """
    found = find(source, revision)
    values = found.read_config()
    if not _is_ours(values):
        imported = published.read(found, device, pooling)
        if imported.classifier is None:
            raise ValueError(f"{source} holds a backbone without a head; fine-tune it first, or open it with load.")
        return imported.classifier
    if not has_head(values):
        raise ValueError(f"{source} holds a backbone without a head; fine-tune it first, or open it with load.")
    head = _head(values, found.name)
    if pooling is not None:
        head = dataclasses.replace(head, pooling=pooling)
    with no_weights():
        model = Classifier(config_from_dict(_shape(values)).build(), head)
    assign(model, _named(found.read_tensors(device), values, model.backbone), found.name, device)
    return model.eval()


def has_head(values: dict[str, Any]) -> bool:
    """Tell whether a config.json of ours is that of a model with a head."""
    return values.get(HEAD) is not None or (_is_exported(values) and _CLASSIFIER in str(values.get("architectures")))


def _is_ours(values: dict[str, Any]) -> bool:
    return "genossm_version" in values


def _is_exported(values: dict[str, Any]) -> bool:
    """Tell whether a folder was written for transformers, where the backbone's config is inside another."""
    return values.get("model_type") == "genossm" and isinstance(values.get("backbone"), dict)


def _shape(values: dict[str, Any]) -> dict[str, Any]:
    if _is_exported(values):
        return dict(values["backbone"])
    return {key: value for key, value in values.items() if key not in ("genossm_version", "notes", HEAD)}


def _head(values: dict[str, Any], source: str) -> HeadConfig:
    """Return the shape of a head; one that transformers added has the shape that the exported code gives it."""
    if values.get(HEAD) is not None:
        return HeadConfig.from_dict(values[HEAD])
    both = bool(_shape(values).get("rcps"))
    return HeadConfig(**labelled(PublishedConfig(values, source).labels), strands=2 if both else 1)


def _named(tensors: dict[str, Tensor], values: dict[str, Any], backbone: Backbone) -> dict[str, Tensor]:
    """Return tensors as a model with a head names them, without the tables that an exported folder holds besides."""
    if not _is_exported(values):
        return {name if name.startswith(f"{HEAD}.") else f"backbone.{name}": t for name, t in tensors.items()}
    tables = {
        ".".join(filter(None, ("backbone", prefix, leaf)))
        for prefix, module in backbone.named_modules(remove_duplicate=False)
        for leaf in module._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in tensors.items() if name not in tables}


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
