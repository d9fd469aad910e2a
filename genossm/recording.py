"""Steps recorded as CUDA graphs: the kernels of a short step start without Python asking for each of them.

A graph takes its input and leaves its results at fixed places in memory, and does what it did when it was recorded:
shapes, weights' places and every decision that Python took are part of it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
MOST = 8
"""Kinds of batches that are recorded; others run as they are."""
_WARM = 3
"""Runs before a recording, in which libraries take their memory and kernels are compiled."""


def record(run: Callable[[], Result], pool: Any = None) -> tuple[Callable[[], None], Result]:
    """Record what a function asks the current GPU to do; returns what does it again, and where its result then stands.

    Random numbers are those that the function would have drawn. It must not use autocast's cache of weights, and no
    result that gradients hang on may be left of another run: autograd would wait for the stream of that one. Graphs of
    one `pool` (`torch.cuda.graph_pool_handle`) share their memory: each one's results last until another one runs.

    Raises:
        RuntimeError: it waits for the GPU, or does something else that no graph can hold.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    drawn = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_rng_state(drawn, device)
    graph = torch.cuda.CUDAGraph()
    try:
        # A thread that loads data may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    except RuntimeError:
        # The generator would go on to wait for the end of the recording, and refuse to draw.
        fresh = torch.Generator(device)
        fresh.set_state(drawn)
        torch.cuda.default_generators[device.index].graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay, result


def cause(error: BaseException) -> str:
    """Return the first line of what went wrong first: ending a recording that failed fails again."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


class _Recorded(NamedTuple):
    """A step that was recorded: where its batch goes, what runs it, and where it leaves what it gives."""

    batch: dict[str, Tensor]
    replay: Callable[[], None]
    loss: Tensor
    grads: list[Tensor | None]


class Steps:
    """The forward and backward passes of training, recorded for each kind of batch that comes a second time.

    Args:
        loss: gives a batch's loss; its shapes and choices must not depend on values.
        parameters: get the gradients.
        share: steps whose gradients are added up; each one's are divided by it.
        recorder: `record`; for results that last until another one runs.
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        parameters: Sequence[nn.Parameter],
        share: int = 1,
        recorder: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]] = record,
    ):
        self._compute, self._parameters, self._share, self._record = loss, parameters, share, recorder
        self._known: dict[tuple[Any, ...], _Recorded | None] = {}
        self._last: _Recorded | None = None
        self._refused = False

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss; unless it was recorded, as `backward` tells, its gradients hang on it as always."""
        self._last = self._find(batch)
        if self._last is None:
            return self._compute(batch)
        for name, place in self._last.batch.items():
            place.copy_(batch[name], non_blocking=True)
        self._last.replay()
        return self._last.loss.clone()

    def backward(self) -> bool:
        """Give the parameters the gradients of the last loss; false where it was not recorded, and nothing was done."""
        if self._last is None:
            return False
        given = [(p, grad) for p, grad in zip(self._parameters, self._last.grads, strict=True) if grad is not None]
        added = [(p.grad, grad) for p, grad in given if p.grad is not None]
        if added:
            torch._foreach_add_(*zip(*added, strict=True))
        for parameter, grad in given:
            if parameter.grad is None:
                # The next step writes to the same place; what others are added to must not be there.
                parameter.grad = grad if self._share == 1 else grad.clone()
        return True

    def _find(self, batch: Mapping[str, Tensor]) -> _Recorded | None:
        """Return the recorded step for such batches, recorded now where it is time to."""
        if self._refused:
            return None
        shapes = tuple((name, x.shape, x.dtype) for name, x in batch.items())
        # A graph reads weights where they were, and gives gradients to those that had some.
        key = (shapes, *((p.data_ptr(), p.requires_grad) for p in self._parameters))
        if key in self._known:
            known = self._known[key]
            if known is None:
                known = self._known[key] = self._recorded(batch)
            return known
        if len(self._known) < MOST:
            # What comes once is not worth it, and the first run compiles kernels.
            self._known[key] = None
            if len(self._known) == MOST:
                logger.info("Steps of %d kinds of batches have come; those of any other kind are not recorded", MOST)
        return None

    def _recorded(self, batch: Mapping[str, Tensor]) -> _Recorded | None:
        places = {name: x.clone() for name, x in batch.items()}
        try:
            replay, (loss, grads) = self._record(lambda: self._both(places))
        except RuntimeError as error:
            self._refused = True
            logger.warning("Steps are not recorded: %s", cause(error))
            return None
        return _Recorded(places, replay, loss, grads)

    def _both(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss and the gradients, each laid out as its parameter is."""
        loss = self._compute(batch)
        trained = [p for p in self._parameters if p.requires_grad]
        # Backward passes run outside autocast.
        with torch.autocast(loss.device.type, enabled=False):
            grads = iter(torch.autograd.grad(loss / self._share, trained, allow_unused=True))
        found = [next(grads) if p.requires_grad else None for p in self._parameters]
        return loss.detach(), [
            None if grad is None else grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
            for p, grad in zip(self._parameters, found, strict=True)
        ]
