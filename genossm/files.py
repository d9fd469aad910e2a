"""Files, below everything else: whole or not at all, plain or gzip, and where caches lie."""

import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """Return the folder for what can't lie beside its source: `$GENOSSM_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("GENOSSM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "genossm"


def is_gzip(path: str | Path) -> bool:
    """Tell whether a file starts with the gzip magic number (BGZF included)."""
    with Path(path).open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file, plain or gzip.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    # Closed by the with below.
    opened = gzip.open(path, "rt", encoding="utf-8") if is_gzip(path) else path.open(encoding="utf-8")  # noqa: SIM115
    with opened as handle:
        try:
            yield handle
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no readable text file: {error}.") from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move what it wrote to `path`, which is whole or untouched at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
