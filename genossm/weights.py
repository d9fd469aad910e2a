"""Weights of a model in memory: built without them, then given tensors that are taken over, not copied."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_SHOWN = 20
_FILLS = ("constant_", "kaiming_uniform_", "normal_", "ones_", "trunc_normal_", "uniform_", "zeros_")
"""Functions of torch.nn.init that give a parameter its first values."""


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Build modules inside the `with` block whose parameters take no memory; `assign` gives them their tensors."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # A parameter that is registered again, under a second name, must stay the same object.
        if parameter.is_meta:
            return parameter
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    # torch declares the hook as returning nothing, and takes over what it returns.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[bad-argument-type]
    # On tensors without memory torch is slow at drawing nothing: half the time of opening a model.
    fills = {name: getattr(nn.init, name) for name in _FILLS}
    for name, fill_ in fills.items():
        setattr(nn.init, name, functools.partial(_unless_meta, fill_))
    try:
        yield
    finally:
        handle.remove()
        for name, fill_ in fills.items():
            setattr(nn.init, name, fill_)


def _unless_meta(fill_: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor if tensor.is_meta else fill_(tensor, *args, **kwargs)


@dataclass
class Place:
    """A tensor of a model's state dict and every module that holds it."""

    tensor: Tensor
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def places(model: nn.Module) -> dict[str, Place]:
    """Return the tensors of a state dict by their first name; shared ones stand once, with all their names."""
    found: dict[int, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        passing = module._non_persistent_buffers_set
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for leaf, tensor in [*parameters, *((name, buffer) for name, buffer in buffers if name not in passing)]:
            place = found.setdefault(id(tensor), Place(tensor))
            place.holders.append((module, leaf))
            place.names.append(f"{prefix}.{leaf}" if prefix else leaf)
    return {place.names[0]: place for place in found.values()}


def assign(model: nn.Module, tensors: Mapping[str, Tensor], source: str, device: str | torch.device = "cpu") -> None:
    """Make tensors the weights of a model; a tensor of the right type and device is taken over without a copy.

    Args:
        model: the model; its own values are dropped.
        tensors: one for each tensor of the state dict, by any of its names; for a tensor with several names, several
            may be there if they are equal.
        source: where the tensors come from, for messages.
        device: where the model goes.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or differs from one that should be the same; the
            message names them.
    """
    expected = places(model)
    chosen, problems = match(expected, tensors)
    refuse(problems, source)
    fill(expected, chosen, device)
    follow(model, device)


def follow(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Move what is not in the state dict to where the weights are; asking every tensor alone takes half of it."""
    if torch.device(device).type != "cpu":
        model.to(device)
    return model


def fill(expected: Mapping[str, Place], chosen: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
    """Give each place its tensor; one of the right type and device is taken over without a copy."""
    for name, place in expected.items():
        value = chosen[name].to(device=device, dtype=place.tensor.dtype)
        if isinstance(place.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=place.tensor.requires_grad)
        for module, leaf in place.holders:
            # What stands there is replaced by its like, so nothing that a module's own setter asks is open.
            held: dict[str, Any] = module._parameters if isinstance(value, nn.Parameter) else module._buffers
            held[leaf] = value


def match(expected: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensor of each place by its first name, and what doesn't fit, one sentence each."""
    first = {name: key for key, place in expected.items() for name in place.names}
    problems = [f"{name} is unknown" for name in tensors if name not in first]
    chosen: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = first.get(name)
        if key is None:
            continue
        place = expected[key]
        if tensor.shape != place.tensor.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(place.tensor.shape)}")
        elif tensor.is_floating_point() != place.tensor.is_floating_point():
            problems.append(f"{name} has type {tensor.dtype} instead of {place.tensor.dtype}")
        elif key in chosen and not torch.equal(chosen[key], tensor):
            problems.append(f"{name} differs from {key}, which is the same tensor in this model")
        chosen.setdefault(key, tensor)
    problems += [f"{key} is missing" for key in expected if key not in chosen]
    return chosen, problems


def refuse(problems: list[str], source: str) -> None:
    """Raise what doesn't fit.

    Raises:
        ValueError: there is a problem; the first ones are named.
    """
    if problems:
        more = f"; … ({len(problems)} in all)" if len(problems) > _SHOWN else ""
        raise ValueError(f"The weights of {source} don't fit its config: {'; '.join(problems[:_SHOWN])}{more}.")
