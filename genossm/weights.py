"""Weights of a model in memory: built without them, then given tensors that are taken over, not copied."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_SHOWN = 20


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Build modules inside the `with` block whose parameters take no memory; `assign` gives them their tensors."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # A parameter that is registered again, under a second name, must stay the same object.
        return parameter if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch declares the hook as returning nothing, and takes over what it returns.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[bad-argument-type]
    try:
        yield
    finally:
        handle.remove()


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
    # Buffers that are not in the state dict follow.
    model.to(device)


def fill(expected: Mapping[str, Place], chosen: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
    """Give each place its tensor; one of the right type and device is taken over without a copy."""
    for name, place in expected.items():
        value = chosen[name].to(device=device, dtype=place.tensor.dtype)
        if isinstance(place.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=place.tensor.requires_grad)
        for module, leaf in place.holders:
            setattr(module, leaf, value)


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
