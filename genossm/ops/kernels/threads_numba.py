"""How torch tensors reach the CPU kernels, and how threads share a kernel's items."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

_pools: dict[int, ThreadPoolExecutor] = {}
"""The pool of each process: a forked child can't use its parent's threads."""


def threads_for(items: int) -> int:
    """Return how many threads share `items` pieces of work: never more than torch itself may use."""
    return max(1, min(torch.get_num_threads(), items))


def run_shared(kernel: Callable[..., None], arguments: tuple[Any, ...], jobs: int) -> None:
    """Run kernel(*arguments, job, jobs) for every job, the first in this thread and the others in the pool."""
    if jobs == 1:
        kernel(*arguments, 0, 1)
        return
    pool = _pools.get(os.getpid())
    if pool is None:
        _pools.clear()
        pool = _pools[os.getpid()] = ThreadPoolExecutor(max(1, os.cpu_count() or 1), "genossm-kernel")
    others = [pool.submit(kernel, *arguments, job, jobs) for job in range(1, jobs)]
    kernel(*arguments, 0, jobs)
    for other in others:
        other.result()


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a contiguous float32 array: the tensor's own memory where it is that already."""
    return tensor.detach().to(torch.float32).contiguous().numpy()


def copied(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a float32 array of its own: for weights, whose memory sharding frees later, which an array forbids."""
    return tensor.detach().to(torch.float32, copy=True).contiguous().numpy()


def lengths_array(lengths_B: Tensor | None, batch: int, length: int) -> npt.NDArray[Any]:
    """Return every row's number of real positions."""
    lengths_B = torch.full((batch,), length) if lengths_B is None else lengths_B.to("cpu", torch.int64)
    return lengths_B.contiguous().numpy()
