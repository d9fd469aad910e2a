"""Published checkpoints into our backbones and back: detection of the layout, import, export."""

import dataclasses
import functools
import importlib
import logging
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.source import Source
from genossm.weights import Place, fill, follow, match, no_weights, places, refuse

logger = logging.getLogger(__name__)


@dataclass
class Origin:
    """What a published file said, so that it can be written again as it was."""

    layout: str
    config: dict[str, Any]
    dtypes: dict[str, str]
    """The type of each tensor by its published name."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that no backbone reads, as they are mapped into memory; see `irreplaceable`."""


@dataclass
class Published:
    """An imported checkpoint."""

    backbone: Backbone
    classifier: Classifier | None
    """The backbone under the head of the file, where it has one."""
    origin: Origin


@functools.cache
def layouts() -> dict[str, Layout]:
    """Return every published layout by name: the modules of the folder are the list."""
    import genossm.layouts as shelf

    found: dict[str, Layout] = {}
    for module in pkgutil.iter_modules(shelf.__path__):
        for value in vars(importlib.import_module(f"{shelf.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Layout) and hasattr(value, "name"):
                found[value.name] = value()
    return found


def layout_of(values: Mapping[str, Any], names: Iterable[str], source: str) -> Layout:
    """Return the layout that a config and the names of the tensors are written in.

    Raises:
        ValueError: none of ours.
    """
    names = list(names)
    shelf = layouts()
    for layout in shelf.values():
        if layout.matches(values, names):
            return layout
    code = " It asks for code of its own (auto_map), which is never run." if values.get("auto_map") else ""
    raise ValueError(
        f"{source} is of no family that we read (model_type={values.get('model_type')!r},"
        f" architectures={values.get('architectures')!r}); there are: {', '.join(sorted(shelf))}.{code}"
    )


def read(source: Source, device: str | torch.device = "cpu", pooling: str | None = None) -> Published:
    """Import a published checkpoint.

    Args:
        source: its files.
        device: where the weights go.
        pooling: how the head pools, one of `nn.head.HEAD_POOLINGS`, where the config doesn't say it (Caduceus, the
            fine-tuning code of HyenaDNA); None is what the published code does unless told otherwise.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the family, a config value, a tensor's name or its shape is not one that we know; it is named.
    """
    values = source.read_config()
    tensors = source.read_tensors(device)
    layout = layout_of(values, tensors, source.name)
    bare = {layout.bare(name): tensor for name, tensor in tensors.items()}
    try:
        config = layout.read_config(PublishedConfig(values, source.name), bare)
        head = layout.read_head(PublishedConfig(values, source.name), bare)
    except ValueError as error:
        raise ValueError(_their_words(str(error), layout)) from None
    if head is not None and pooling is not None:
        head = dataclasses.replace(head, pooling=pooling)
    with no_weights():
        backbone = config.build()
        classifier = None if head is None else Classifier(backbone, head)
    expected = _expected(backbone, classifier)
    placed, kept, problems = _place(layout, tensors, expected)
    problems += [
        f"{name} {problem}"
        for name, tensor in kept.items()
        if (problem := layout.misfit(layout.bare(name), tensor, backbone)) is not None
    ]
    needed = layout.required(config, PublishedConfig(values, source.name).architecture)
    problems += [f"{layout.full(name, head)} is missing" for name in needed if name not in bare]
    values_of = {name: tensor for name, (_, tensor) in placed.items()}
    for name in expected:
        value = layout.constant(name, config)
        if value is not None and values_of.setdefault(name, value) is not value:
            problems.append(f"{placed[name][0]} is unknown: the config says that it is no parameter")
    chosen, misfits = match(expected, values_of)
    refuse(problems + [_in_file(layout, config, head, placed, text) for text in misfits], source.name)
    fill(expected, chosen, device)
    # Buffers that no file holds follow.
    follow(backbone if classifier is None else classifier, device).eval()
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return Published(backbone, classifier, Origin(layout.name, dict(values), dtypes, kept))


def irreplaceable(origin: Origin, backbone: Backbone) -> dict[str, Tensor]:
    """Return the tensors that no backbone reads and that can't be computed again bit by bit: what must be stored."""
    layout = layouts()[origin.layout]
    stored: dict[str, Tensor] = {}
    for name, tensor in origin.kept.items():
        again = layout.regenerate(layout.bare(name), backbone)
        if again is None or again.dtype != tensor.dtype or not torch.equal(again, tensor):
            stored[name] = tensor
    return stored


def _expected(backbone: Backbone, classifier: Classifier | None) -> dict[str, Place]:
    expected = places(backbone)
    if classifier is not None:
        for name, place in places(classifier.head).items():
            place.names = [f"head.{name}" for name in place.names]
            expected[f"head.{name}"] = place
    return expected


def _place(
    layout: Layout, tensors: Mapping[str, Tensor], expected: Mapping[str, Place]
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, Tensor], list[str]]:
    """Return names in the file and tensors by our names, those that nothing of ours reads, and what doesn't fit."""
    known = {name for place in expected.values() for name in place.names}
    placed: dict[str, tuple[str, Tensor]] = {}
    dropped: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        in_table, ours = layout.ours(name)
        optional = ours is None or ours.endswith("?")
        ours = None if ours is None else ours.removesuffix("?")
        if ours is not None and ours not in known:
            ours = layout.stand_in(ours)
        if not in_table or (not optional and ours not in known):
            problems.append(f"{name} is unknown")
        elif ours is None or ours not in known:
            dropped[name] = tensor
        else:
            fitted = layout.fit(layout.bare(name), tensor)
            if ours in placed and not torch.equal(placed[ours][1], fitted):
                problems.append(f"{name} differs from {placed[ours][0]}, which is the same tensor in this model")
            placed[ours] = name, fitted
    return placed, dropped, problems


def _in_file(
    layout: Layout,
    config: BackboneConfig,
    head: HeadConfig | None,
    placed: Mapping[str, tuple[str, Tensor]],
    problem: str,
) -> str:
    """Return a problem with the name that the file has for the tensor, or would have."""
    ours, _, rest = problem.partition(" ")
    if ours in placed:
        return f"{placed[ours][0]} {rest}"
    theirs = layout.theirs(ours, config)
    return f"{ours if theirs is None else layout.full(theirs, head)} {rest}"


def _their_words(message: str, layout: Layout) -> str:
    """Return a message of our config in the words of the published one."""
    for ours, theirs in layout.words.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message


def write(
    model: Backbone | Classifier, layout_name: str, origin: Origin | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Export a model to a published layout.

    Args:
        model: a backbone, or one under a head.
        layout_name: one of `layouts()`.
        origin: what the model was imported from; where it is of the same layout, the export is that file again.

    Returns:
        The published config and the tensors by their published names.

    Raises:
        ValueError: there is no such layout, or the model has something that the layout can't hold.
    """
    shelf = layouts()
    if layout_name not in shelf:
        raise ValueError(f"No layout is named {layout_name!r}; there are: {', '.join(sorted(shelf))}.")
    layout = shelf[layout_name]
    classifier = model if isinstance(model, Classifier) else None
    backbone = model if isinstance(model, Backbone) else model.backbone
    if backbone.config.model_type != layout.model_type:
        raise ValueError(
            f"Layout {layout_name} is for {layout.model_type}; the model is a {backbone.config.model_type}."
        )
    expected = _expected(backbone, classifier)
    state = {name: place.tensor.detach() for place in expected.values() for name in place.names}
    if origin is not None and origin.layout == layout_name:
        return origin.config, _again(layout, backbone, state, origin)
    head = None if classifier is None else classifier.head.config
    config = layout.write_config(backbone, head)
    tensors: dict[str, Tensor] = {}
    for name, place in expected.items():
        if layout.constant(name, backbone.config) is not None:
            continue
        theirs = layout.theirs(name, backbone.config)
        if theirs is None:
            raise ValueError(f"Layout {layout_name} has no place for {name}.")
        tensors[layout.full(theirs, head)] = layout.unfit(theirs, place.tensor.detach())
    for theirs in layout.regenerable(backbone.config):
        value = layout.regenerate(theirs, backbone)
        if value is not None:
            tensors.setdefault(layout.full(theirs, head), value)
    return config, tensors


def _again(layout: Layout, backbone: Backbone, state: Mapping[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, dtype in origin.dtypes.items():
        bare, (_, ours) = layout.bare(name), layout.ours(name)
        ours = None if ours is None else ours.removesuffix("?")
        if ours is not None and ours not in state:
            ours = layout.stand_in(ours)
        if ours is not None and ours in state:
            value = layout.unfit(bare, state[ours])
        elif name in origin.kept:
            value = origin.kept[name]
        else:
            regenerated = layout.regenerate(bare, backbone)
            assert regenerated is not None, name
            value = regenerated
        tensors[name] = value.to(getattr(torch, dtype))
    return tensors
