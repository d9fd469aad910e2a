"""Long jobs that survive a kill: numbered parts, a manifest, shards, a progress bar with the time left.

A job is a list of parts, each a pure function of its number. A part is written under another name and renamed when it
is whole; the manifest beside the parts says which job they belong to. The same command started again computes only the
parts that are missing, and what it writes in the end is the same file, byte by byte.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import genossm
from genossm.files import write_atomically

logger = logging.getLogger(__name__)

_PROCESSES = 8
"""So many processes, half or a quarter of them get equally many parts."""
_SHOW_AFTER = 2.0
"""Seconds that a job runs before it shows its progress."""
_LINE_EVERY = 15.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Shard:
    """Which parts this process computes: those whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """Read `i/n`, i from 1, and divide further over the ranks that torchrun started.

        Raises:
            ValueError: the text is no shard.
        """
        index, count = 0, 1
        if text is not None:
            first, _, second = text.partition("/")
            if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
                raise ValueError(f"shard must be i/n with 1 <= i <= n, for example 3/16; got {text!r}.")
            index, count = int(first) - 1, int(second)
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        return cls(index * ranks + rank, count * ranks)

    def owns(self, part: int) -> bool:
        """Tell whether this process computes a part."""
        return part % self.count == self.index


def part_size(total: int, most: int, least: int) -> int:
    """Return how much of some work makes a part, so that 2, 4 or 8 processes have equally much to do.

    The number of processes is not asked for: a job may go on with another one.

    Args:
        total: the whole work.
        most: of a part.
        least: of a part, where that is not above `most`; little work makes few parts.
    """
    rounds = max(1, -(-total // (_PROCESSES * most)))
    return max(min(least, most), -(-total // (_PROCESSES * rounds)))


class Job:
    """The parts of one output and the claim on its path.

    Args:
        out: the file (or folder, for Zarr) that the job makes. Parts and manifest stand in `<out>.parts`; after the
            end `<out>.manifest.json` says which job made it.
        identity: plain values that determine the output: verb, model, inputs, options. The same identity is the same
            job, which may be resumed; another one may not.
        parts: number of parts.
        shard: which of them this process computes.
        overwrite: replace an output, or unfinished parts, of another job; compute a finished one anew.

    Raises:
        FileExistsError: the output, or the parts, belong to something else.
        OSError: the folder can't be written.
    """

    def __init__(
        self,
        out: str | Path,
        identity: Mapping[str, Any],
        parts: int,
        shard: Shard | None = None,
        overwrite: bool = False,
    ):
        self.out = Path(out)
        self.parts = parts
        self.shard = shard or Shard()
        self.identity = {"genossm_version": genossm.__version__, "parts": parts, **identity}
        self.digest = digest_of(self.identity)
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.manifest = self.out.with_name(f"{self.out.name}.manifest.json")
        self.finished = False
        self._claim(overwrite)

    def _claim(self, overwrite: bool) -> None:
        done, open_job = _read_manifest(self.manifest), _read_manifest(self.folder / "manifest.json")
        if self.out.exists() and not overwrite:
            if done.get("job") == self.digest:
                self.finished = True
                return
            if open_job.get("job") != self.digest:
                raise FileExistsError(
                    f"{self.out} is there already and was not made by this command{self._difference(done)}. Choose"
                    " another out, or replace it with --overwrite."
                )
        if open_job and open_job.get("job") != self.digest:
            if not overwrite:
                raise FileExistsError(
                    f"{self.folder} holds the parts of another job{self._difference(open_job)}. Finish that one, delete"
                    " the folder, or start anew with --overwrite."
                )
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            values = {"job": self.digest, "identity": self.identity}
            write_atomically(self.folder / "manifest.json", lambda path: path.write_text(json.dumps(values, indent=1)))
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"{self.out.parent} can't be written ({error.strerror or error}); choose another out.",
            ) from None

    def _difference(self, other: Mapping[str, Any]) -> str:
        """Name what distinguishes a manifest's job from this one, for messages."""
        theirs = other.get("identity")
        if not isinstance(theirs, dict):
            return ""
        keys = [key for key in self.identity if self.identity[key] != theirs.get(key)]
        return f" (it differs in: {', '.join(keys)})" if keys else ""

    def path_of(self, part: int) -> Path:
        """Return where a part stands once it is whole."""
        return self.folder / f"part-{part:06d}.parquet"

    def run(
        self,
        write: Callable[[int, Path], object],
        merge: Callable[[Sequence[Path], Path], object],
    ) -> bool:
        """Compute this shard's missing parts, and merge where all parts of all shards are there.

        Args:
            write: `write(part, path)` computes a part into a file.
            merge: `merge(paths, path)` makes the output from the parts, in order.

        Returns:
            Whether the output is there; False where other shards are still to finish.
        """
        if self.finished:
            logger.info("%s is there already, made by this very command", self.out)
            return True
        for part in range(self.parts):
            path = self.path_of(part)
            if self.shard.owns(part) and not path.exists():
                write_atomically(path, lambda temporary, part=part: write(part, temporary))
        missing = sum(not self.path_of(part).exists() for part in range(self.parts))
        if missing:
            # Another shard may have merged and removed the parts while this one looked.
            if _read_manifest(self.manifest).get("job") == self.digest and not self.folder.exists():
                return True
            logger.info("%d of %d parts of %s are still missing: other shards make them", missing, self.parts, self.out)
            return False
        with self._joining():
            # Another rank may have found all parts there at the same moment, and joined them first.
            if not (self.folder / "manifest.json").exists():
                return True
            # Made inside the folder of the parts, so that a kill leaves nothing that the next start does not clear.
            temporary = self.folder / f"merged.{os.getpid()}{self.out.suffix}"
            merge([self.path_of(part) for part in range(self.parts)], temporary)
            if self.out.is_dir():
                shutil.rmtree(self.out)
            temporary.replace(self.out)
            values = {"job": self.digest, "identity": self.identity}
            write_atomically(self.manifest, lambda path: path.write_text(json.dumps(values, indent=1) + "\n"))
            shutil.rmtree(self.folder, ignore_errors=True)
        return True

    @contextlib.contextmanager
    def _joining(self) -> Iterator[None]:
        """Keep other processes from joining; the system frees the lock of one that is killed."""
        if sys.platform == "win32":
            yield
            return
        import fcntl

        # A folder can be locked as a file can, and leaves nothing behind.
        try:
            handle = os.open(self.folder, os.O_RDONLY)
        except FileNotFoundError:
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the digest of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def identity_of_file(path: str | Path) -> dict[str, Any]:
    """Return what tells that an input file is still the same: name, size, time of its last change.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


class Progress:
    """A bar with the time left on stderr, or a line now and then where there is no terminal.

    It shows itself only once the work has taken two seconds, and counts work done in any unit.

    Args:
        what: a verb for the line, such as "embedding".
        total: the amount of work.
        unit: what is counted, such as "bp".
    """

    def __init__(self, what: str, total: int, unit: str = ""):
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Count work that is done."""
        self.done += amount
        now = time.monotonic()
        if now - self._began < _SHOW_AFTER:
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            left = (now - self._began) / max(1, self.done) * (self.total - self.done)
            sys.stderr.write(f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {left:.0f} s left\n")

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns = (TextColumn(self.what), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
            columns += (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self.done)
