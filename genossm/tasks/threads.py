"""Rows of a batch on threads of their own: the forward and the backward pass side by side, for small models on a CPU.

Threads inside operations meet after every one of a step's thousand short operations, and wait for each other there;
threads that take rows meet once a step.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from genossm.models.base import Backbone

_pools: dict[int, ThreadPoolExecutor] = {}
"""The pool of each process: a forked child can't use its parent's threads."""

Part = Callable[[], Tensor]


def parts_for(model: Backbone, rows: int, device: torch.device) -> int:
    """Return into how many parts, each on its own thread, a training batch of `rows` is divided; 1 is not at all.

    Dropout draws from one generator, in the order of one thread. Gradient checkpointing, compiled models, autocast and
    several processes have rules for threads of their own.
    """
    fits = device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    plain = not model.gradient_checkpointing and model._compiled_call_impl is None
    draws = model.training and any(value > 0 for name, value in vars(model.config).items() if name.endswith("dropout"))
    return max(1, min(torch.get_num_threads(), rows)) if fits and alone and plain and not draws else 1


def summed(parts: Sequence[Part], module: nn.Module) -> Tensor:
    """Return the sum of scalars, each computed by a thread of its own together with its gradients.

    The value and its gradients are those of `sum(part() for part in parts)`, added in that order, so that a run repeats
    bit by bit.

    Args:
        parts: compute one scalar each from the parameters of `module`.
        module: its trained parameters get the gradients.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _Summed.apply(parts, *parameters)


class _Summed(torch.autograd.Function):
    """Differentiates while the values are computed, and hands the gradients over when they are asked for."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], *parameters: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        each = max(1, threads // len(parts))
        others = [_pool().submit(_differentiate, part, parameters, each) for part in parts[1:]]
        try:
            results = [_differentiate(parts[0], parameters, each)]
        finally:
            # Whatever one of them raises, none may go on beside what follows.
            for other in others:
                other.exception()
            torch.set_num_threads(threads)
        results += [other.result() for other in others]
        ctx.grads = [_total(grads) for grads in zip(*(grads for _, grads in results), strict=True)]
        return torch.stack([value for value, _ in results]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if own is None else own * grads[0] for own in ctx.grads)


def _differentiate(part: Part, parameters: Sequence[Tensor], threads: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    torch.set_num_threads(threads)
    with torch.enable_grad():
        value = part()
        return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)


def _total(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    total: Tensor | None = None
    for grad in grads:
        total = grad if total is None else total if grad is None else total + grad
    return total


def _pool() -> ThreadPoolExecutor:
    pool = _pools.get(os.getpid())
    if pool is None:
        _pools.clear()
        pool = _pools[os.getpid()] = ThreadPoolExecutor(max(1, os.cpu_count() or 1), "genossm-rows")
    return pool
