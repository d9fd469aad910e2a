"""Files, below everything else: whole or not at all, plain or gzip, and where caches lie."""

import contextlib
import gzip
import os
import shutil
import struct
import tempfile
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


def write_folder_atomically(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` with an empty folder and move it to `folder`, which is whole or untouched at any moment.

    What is there is replaced as a whole; where it is a link to a folder, the link is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(temporary)
        temporary.chmod(0o755)
        if not (folder.exists() or folder.is_symlink()):
            temporary.rename(folder)
            return
        old = temporary.with_name(f"{temporary.name}.old")
        folder.rename(old)
        temporary.rename(folder)
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class BgzfWriter:
    """A binary file of gzip blocks of at most 64 KiB (BGZF, SAM specification 4.1), which tabix and pysam can index.

    Args:
        path: the file.
    """

    _BLOCK = 65280

    def __init__(self, path: Path):
        self._handle = path.open("wb")
        self._waiting = bytearray()

    def __enter__(self) -> "BgzfWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush(last=True)
        # The empty block that marks the end.
        self._block(b"")
        self._handle.close()

    def write(self, data: bytes) -> None:
        """Add bytes."""
        self._waiting += data
        self._flush()

    def _flush(self, last: bool = False) -> None:
        while len(self._waiting) >= self._BLOCK or (last and self._waiting):
            self._block(bytes(self._waiting[: self._BLOCK]))
            del self._waiting[: self._BLOCK]

    def _block(self, data: bytes) -> None:
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = deflate.compress(data) + deflate.flush()
        # Header with the extra field BC: the block's size less one.
        head = b"\x1f\x8b\x08\x04" + b"\0" * 4 + b"\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(packed) + 25)
        self._handle.write(head + packed + struct.pack("<II", zlib.crc32(data), len(data)))
