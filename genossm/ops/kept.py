"""Results that a checkpointed region keeps: what takes long to make again and little memory to hold.

`torch.utils.checkpoint` makes a region again in the backward pass; with `context_fn=region`, what `kept` made the first
time is handed out again instead.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token

from torch import Tensor


class Pass(contextlib.AbstractContextManager[None]):
    """A pass over a region: the first, or one that makes it again and takes in turn what the first one put there."""

    def __init__(self, results: list[list[Tensor]], again: bool):
        self.results, self.again, self.taken, self.ending = results, again, 0, False
        self._token: Token[Pass | None] | None = None

    def __enter__(self) -> None:
        self.taken = 0
        self._token = _running.set(self)

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _running.reset(self._token)


_running: ContextVar[Pass | None] = ContextVar("genossm_kept", default=None)


def region() -> tuple[Pass, Pass]:
    """Return the contexts of a region's first pass and of those that make it again, as `checkpoint` asks for them."""
    results: list[list[Tensor]] = []
    return Pass(results, again=False), Pass(results, again=True)


def inside() -> bool:
    """Tell whether a region runs."""
    return _running.get() is not None


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Step outside of the region that runs: what happens meanwhile is no part of it."""
    token = _running.set(None)
    try:
        yield
    finally:
        _running.reset(token)


def remaking() -> bool:
    """Tell whether a region is made again, for its gradients alone."""
    running = _running.get()
    return running is not None and running.again


@contextlib.contextmanager
def last_step() -> Iterator[None]:
    """Mark a region's last step: nothing behind it may keep anything for gradients that hangs on its result."""
    running = _running.get()
    if running is not None:
        running.ending = True
    try:
        yield
    finally:
        if running is not None:
            running.ending = False


def unread() -> bool:
    """Tell whether the last step of a region runs that is made again, so that nothing takes its result."""
    running = _running.get()
    return running is not None and running.again and running.ending


def keep(*results: Tensor) -> None:
    """Hold results for the passes that make this region again; outside of one, nothing."""
    running = _running.get()
    if running is not None:
        running.results.append(list(results))


def kept() -> list[Tensor]:
    """Return what the next call of `keep` in the first pass over this region held."""
    running = _running.get()
    assert running is not None
    assert running.again
    running.taken += 1
    return list(running.results[running.taken - 1])
