"""Published files: downloaded whole or not at all, checked, unpacked inside their folder, and kept as one table."""

import hashlib
import logging
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from genossm.data.examples import Example, Target
from genossm.dna.interval import Interval
from genossm.files import write_atomically

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_HUB_TIMEOUT = 10.0
"""Seconds that the hub may take to answer at all."""
MAX_UNPACKED = 1 << 34
"""Bytes that an archive may unpack to; the largest published one needs a hundredth."""


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str | None = None, timeout: float = 60.0) -> Path:
    """Fetch a file, unless it is there already, and check it.

    Args:
        url: where it is, https.
        path: where it goes, whole or not at all.
        sha256: what its SHA-256 must be; None notes that of the first download beside it and holds later ones to it.
        timeout: seconds without an answer before it gives up.

    Raises:
        ConnectionError: there is no network, or the download broke off; says what can be done offline.
        ValueError: the checksum is another; the file is not kept.
    """
    noted = path.with_name(f"{path.name}.sha256")
    wanted = sha256 or (noted.read_text().split()[0] if noted.exists() else None)
    if not path.exists():

        def write(temporary: Path) -> None:
            request = urllib.request.Request(url, headers={"User-Agent": "genossm"})  # noqa: S310
            with urllib.request.urlopen(request, timeout=timeout) as answer, temporary.open("wb") as out:  # noqa: S310
                shutil.copyfileobj(answer, out, _BLOCK)
                size = answer.headers.get("Content-Length")
            if size is not None and temporary.stat().st_size != int(size):
                raise ConnectionError(f"{url} broke off after {temporary.stat().st_size} of {size} bytes; try again.")
            _compare(temporary, wanted, url)

        if not url.startswith(("https://", "file://")):
            raise ValueError(f"A download needs https; got {url}.")
        logger.info("downloading %s", url)
        try:
            write_atomically(path, write)
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise ConnectionError(
                f"{url} could not be fetched ({reason}). Without a network: fetch it elsewhere, put it at {path} and"
                " run this again."
            ) from None
    _compare(path, wanted, str(path))
    if not noted.exists():
        write_atomically(noted, lambda temporary: temporary.write_text(f"{checksum(path)}  {path.name}\n"))
    return path


def _compare(path: Path, wanted: str | None, source: str) -> None:
    if wanted is not None and checksum(path) != wanted.lower():
        raise ValueError(
            f"{source} has the SHA-256 {checksum(path)} instead of {wanted}: it is damaged or another version. Delete"
            " it and try again, or give the checksum of the version that you want."
        )


def unpack(archive: Path, folder: Path, limit: int = MAX_UNPACKED) -> Path:
    """Unpack a zip or tar archive into a folder, whole or not at all; nothing is written outside it.

    Args:
        archive: the file.
        folder: made by this; an older one is replaced.
        limit: bytes that the members may have in all.

    Raises:
        ValueError: it is no archive, is damaged, too large, or a member is a link or would leave the folder.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    _unzip(opened, temporary, limit)
            else:
                with tarfile.open(archive) as opened:
                    _untar(opened, temporary, limit)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive} is no readable archive ({error}); delete it and fetch it again.") from None

    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _inside(name: str, folder: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or name.startswith(("/", "\\")) or ":" in parts[0]:
        raise ValueError(f"The archive has a member {name!r} that would leave its folder; nothing was unpacked.")
    return folder.joinpath(*parts)


def _unzip(archive: zipfile.ZipFile, folder: Path, limit: int) -> None:
    members = archive.infolist()
    _refuse_size(sum(member.file_size for member in members), limit)
    for member in members:
        path = _inside(member.filename, folder)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"The archive has a link {member.filename!r}; nothing was unpacked.")
        if not member.is_dir():
            with archive.open(member) as source:
                _copy(source, path, member.file_size)


def _untar(archive: tarfile.TarFile, folder: Path, limit: int) -> None:
    members = archive.getmembers()
    _refuse_size(sum(member.size for member in members), limit)
    for member in members:
        path = _inside(member.name, folder)
        if not (member.isfile() or member.isdir()):
            raise ValueError(f"The archive has {member.name!r}, neither file nor folder; nothing was unpacked.")
        source = archive.extractfile(member) if member.isfile() else None
        if source is not None:
            _copy(source, path, member.size)


def _copy(source: IO[bytes], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        shutil.copyfileobj(source, out, _BLOCK)
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} unpacks to {path.stat().st_size} bytes where the archive says {size}.")


def _refuse_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"The archive would unpack to {size:,} bytes; at most {limit:,} are allowed.")


def hub_rows(repo: str, split: str) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Return the rows of a split of a hub data set and the names of its classes, where it gives them.

    Only files of data are read; a script that such a repository may hold is never run.

    Raises:
        ConnectionError: the hub can't be reached, or has no such data set.
    """
    import datasets

    _reach_hub()
    try:
        found: Any = datasets.load_dataset(repo, split=split)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(f"{repo} can't be reached ({type(error).__name__}: {str(error)[:120]})") from None
    return list(found), getattr(found.features["label"], "names", None)


def _reach_hub() -> None:
    """Ask the hub for anything, once: its own library asks six times, for half a minute, where there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # What is in the library's cache is wanted.
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_HUB_TIMEOUT).close()  # noqa: S310
    except urllib.error.HTTPError:
        return  # It answers.
    except OSError as error:
        raise ConnectionError(f"{constants.ENDPOINT} can't be reached ({getattr(error, 'reason', error)})") from None


def save_table(path: Path, splits: dict[str, list[Example]], target: Target, notes: Sequence[str]) -> None:
    """Keep examples of classes in a Parquet file that is opened without network ever after."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(split, e) for split, examples in splits.items() for e in examples]
    places = [e.interval for _, e in rows]
    table = pa.table(
        {
            "split": pa.array([split for split, _ in rows]).dictionary_encode(),
            "label": pa.array([target.names[e.target] for _, e in rows]).dictionary_encode(),
            "sequence": [e.sequence for _, e in rows],
            "name": [e.name for _, e in rows],
            "chrom": pa.array([i.chrom if i else None for i in places], pa.string()),
            "start": pa.array([i.start if i else None for i in places], pa.int64()),
            "end": pa.array([i.end if i else None for i in places], pa.int64()),
            "strand": pa.array([i.strand if i else None for i in places], pa.string()),
        },
        metadata={"kind": target.kind, "names": "\n".join(target.names), "notes": "\n".join(notes)},
    )
    write_atomically(path, lambda temporary: parquet.write_table(table, temporary, compression="zstd"))


def load_table(path: Path) -> tuple[dict[str, list[Example]], Target, list[str]]:
    """Open what `save_table` kept.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        target = Target(kind=said["kind"], names=tuple(said["names"].split("\n")))
        columns = table.to_pydict()
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is made again.") from None
    index = {name: i for i, name in enumerate(target.names)}
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    for split, label, sequence, name, chrom, start, end, strand in zip(*columns.values(), strict=True):
        interval = Interval(chrom, start, end, strand) if chrom is not None else None
        splits[split].append(Example(sequence, index[label], interval, name))
    return splits, target, [note for note in said["notes"].split("\n") if note]
