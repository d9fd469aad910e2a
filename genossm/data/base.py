"""What every data set promises: batches that are a pure function of their number, and a loader that can resume."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import NotRequired

SPLITS = ("train", "val", "test")


class Batch(TypedDict):
    """One batch as the loaders give it and the tasks take it."""

    ids_BL: Tensor
    """uint8 token ids."""
    lengths_B: NotRequired[Tensor]
    """Real tokens of each row, where rows differ; padding stands on the right."""
    targets: NotRequired[Tensor]
    """What to predict; `transforms.IGNORED` at positions that don't count."""
    weights_BL: NotRequired[Tensor]
    """Loss weight of each position (soft-masked repeats)."""


class BatchNumbers(Sampler[int]):
    """The batch numbers of a run, from `start` to `stop`: the only state that a loader has."""

    def __init__(self, stop: int, start: int = 0):
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


class NumberedBatches(Dataset[Batch], ABC):
    """The batches of a whole run as a pure function of the batch number.

    Nothing is remembered between batches, so a run that goes on at batch i sees what an uninterrupted one sees from
    there, with any number of workers. Under several processes each returns its own rows of the same global batch.
    """

    @abstractmethod
    def __getitem__(self, index: int) -> Batch:
        """Return this process's part of batch `index` of the run."""


class RunLoader(DataLoader[Batch]):
    """A loader over `NumberedBatches` that can be saved and restored in the middle: its state is one integer.

    Args:
        batches: what to load.
        count: batches in the run.
        num_workers: processes that prepare batches ahead; a memory-mapped genome is fastest with none.
        pin_memory: for copies to a GPU that overlap with its work.
    """

    def __init__(self, batches: NumberedBatches, count: int, num_workers: int = 0, pin_memory: bool = False):
        self.numbers = BatchNumbers(count)
        self.next = 0
        super().__init__(
            batches,
            batch_size=None,
            sampler=self.numbers,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Workers are seeded from it; without one of its own, each pass would draw from torch's global generator,
            # and a resumed run would drop out other values than an uninterrupted one.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Counted as they are handed out, not as workers prepare them.
        self.next = self.numbers.start
        for batch in super().__iter__():
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the batch that `state` names."""
        self.numbers.start = state["next"]


def shuffled_rows(rows: int, batch_size: int, number: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the rows of global batch `number` where every pass over the data is a new order.

    Args:
        rows: rows of the data set.
        batch_size: rows of a global batch; a pass drops those that don't fill one, unless there are fewer in all.
        number: number of the batch in the whole run.
        seed: what the orders are drawn from, with the number of the pass.
    """
    per_pass = max(1, rows // batch_size)
    this_pass, within = divmod(number, per_pass)
    order = _order(rows, this_pass, seed)
    return order[within * batch_size : (within + 1) * batch_size]


@functools.lru_cache(maxsize=4)
def _order(rows: int, this_pass: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, this_pass]).permutation(rows)
