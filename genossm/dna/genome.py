"""Genomes on disk: FASTA files encoded once into memory-mapped bytes, read without a parser afterwards.

A store is one file: the bases of all contigs, one byte each (`dna.alphabet`), then a JSON footer with the names,
offsets and lengths, the identity of the FASTA that it was made from and a checksum, then the footer's length and a
magic word. It is written beside the FASTA, or in the cache folder where that is read-only, under a temporary name
that is renamed when it is whole. Nothing is opened before it is read, and nothing open is pickled: a `Genome` may
be used under fork, spawn and threads.
"""

import contextlib
import errno
import gzip
import json
import logging
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from genossm.dna import alphabet
from genossm.dna.alphabet import Bytes
from genossm.dna.interval import Interval
from genossm.files import cache_folder, is_gzip

logger = logging.getLogger(__name__)

_MAGIC = b"GENOSSM1"
_BLOCK = 1 << 24
_MAX_NAME = 1 << 16
_MAX_RATIO = 500
_RATIO_FROM = 1 << 28
"""Decompressed bytes from which the ratio is judged: an all-N contig alone compresses a thousandfold."""


@dataclass(frozen=True, slots=True)
class Contig:
    """One sequence of a store: `offset` and `length` in bases."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Footer:
    size: int
    mtime_ns: int
    checksum: int
    contigs: list[Contig]


class Genome:
    """Random access to the contigs of one or several FASTA files.

    Args:
        paths: FASTA files, plain, gzip or BGZF. Each is encoded on first use and found again afterwards.
        cache: folder for the encoded files; by default beside each FASTA, or `cache_folder()` where that is
            read-only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty, no FASTA, or a contig name appears twice.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], cache: str | Path | None = None):
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        if not listed or "" in map(str, listed):
            raise ValueError("A genome needs at least one FASTA file; got none.")
        self.paths = [Path(p) for p in listed]
        self._stores = [encode(path, cache) for path in self.paths]
        self._where: dict[str, tuple[int, Contig]] = {}
        for number, store in enumerate(self._stores):
            for contig in _read_footer(store).contigs:
                if contig.name in self._where:
                    other = self.paths[self._where[contig.name][0]]
                    raise ValueError(
                        f"Contig {contig.name!r} is in {other} and in {self.paths[number]}; rename one of the two."
                    )
                self._where[contig.name] = (number, contig)
        self._arrays: dict[int, Bytes] = {}
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def contigs(self) -> dict[str, int]:
        """Contig names and their lengths in bp, in the order of the files."""
        return {name: contig.length for name, (_, contig) in self._where.items()}

    def __getstate__(self) -> dict[str, object]:
        # Memory maps are reopened where they are needed: in a worker process, after unpickling.
        return {**self.__dict__, "_arrays": {}, "_maps": {}}

    def resolve(self, name: str) -> str:
        """Return the contig's name as this genome spells it: `20`, `chr20` and `Chr20` are the same.

        Raises:
            KeyError: there is no such contig; the message lists what there is.
        """
        if name in self._where:
            return name
        stem = name[3:] if name.lower().startswith("chr") else name
        spellings = [stem, f"chr{stem}", f"Chr{stem}"]
        if stem in ("M", "MT"):
            spellings += ["MT", "chrM", "M", "chrMT"]
        for spelling in spellings:
            if spelling in self._where:
                return spelling
        known = list(self._where)
        shown = ", ".join(known[:8]) + (f", … ({len(known)} in all)" if len(known) > 8 else "")
        raise KeyError(f"No contig is named {name!r}; there are: {shown}.")

    def size(self, name: str) -> int | None:
        """Return the length of a contig in bp, or None where there is none of that name."""
        try:
            return self._where[self.resolve(name)][1].length
        except KeyError:
            return None

    def codes(self, name: str) -> Bytes:
        """Return one contig as stored bytes: a read-only view of the memory map, nothing is copied."""
        number, contig = self._where[self.resolve(name)]
        return self.store(number)[contig.offset : contig.offset + contig.length]

    def place(self, name: str) -> tuple[int, int]:
        """Return the number of the store that holds a contig, and where in it the contig begins."""
        number, contig = self._where[self.resolve(name)]
        return number, contig.offset

    def store(self, number: int) -> Bytes:
        """Return all that one store holds, a read-only view of its memory map; for reading many windows at once."""
        if number not in self._arrays:
            with self._stores[number].open("rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._arrays[number] = np.frombuffer(mapped, dtype=np.uint8)
            self._maps[number] = mapped
        return self._arrays[number]

    def release(self) -> None:
        """Take the pages that were read out of this process's memory; they are read again where they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def fetch(self, interval: Interval) -> Bytes:
        """Return the bytes of an interval; what lies beyond the contig's end is N, strand `-` is complemented."""
        contig = self.codes(interval.chrom)
        codes = contig[interval.start : interval.end]
        if len(codes) < len(interval):
            codes = np.concatenate([codes, np.full(len(interval) - len(codes), alphabet.N, np.uint8)])
        return alphabet.reverse_complement(codes) if interval.strand == "-" else codes

    def verify(self) -> None:
        """Read every store whole and compare its checksum.

        Raises:
            ValueError: a store is damaged; it names the file to delete.
        """
        for store in self._stores:
            footer = _read_footer(store)
            with store.open("rb") as handle:
                if _checksum(handle, sum(c.length for c in footer.contigs)) != footer.checksum:
                    raise ValueError(f"{store} is damaged; delete it, it is made again from the FASTA.")


def encode(path: str | Path, cache: str | Path | None = None) -> Path:
    """Encode a FASTA into a store, or find the store that was made from this very file.

    Args:
        path: a FASTA file, plain, gzip or BGZF.
        cache: the folder for the store; by default beside the FASTA, or `cache_folder()`.

    Returns:
        The path of the store.

    Raises:
        FileNotFoundError, ValueError: see `Genome`.
        OSError: no folder can be written, or the disk is full; nothing half-written stays.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no FASTA file {str(path)!r}.")
    stat = path.stat()
    for store in _store_paths(path, cache):
        with contextlib.suppress(OSError, ValueError):
            footer = _read_footer(store)
            if (footer.size, footer.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return store
    refused: list[str] = []
    for store in _store_paths(path, cache):
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            handle = tempfile.NamedTemporaryFile(  # noqa: SIM115
                dir=store.parent, prefix=f".{store.name}.", delete=False
            )
        except OSError as error:
            refused.append(f"{store.parent} ({error.strerror})")
            continue
        temporary = Path(handle.name)
        try:
            with handle:
                _write_store(path, handle, stat)
                handle.flush()
                os.fsync(handle.fileno())
            # Temporary files are for their owner alone; whoever may read the FASTA may read what was made of it.
            temporary.chmod(stat.st_mode & 0o444 | 0o600)
            temporary.replace(store)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    errno.ENOSPC,
                    f"The encoded form of {path} could not be written to {store.parent}: {error.strerror}. It needs one"
                    " byte a base; free some space, or set data.cache to a folder that has it.",
                ) from None
            raise
        finally:
            temporary.unlink(missing_ok=True)
        logger.info("encoded %s into %s", path, store)
        return store
    raise PermissionError(
        f"The encoded form of {path} can be written nowhere: {'; '.join(refused)}. Set data.cache or GENOSSM_CACHE to"
        " a folder that you may write to."
    )


def _store_paths(path: Path, cache: str | Path | None) -> list[Path]:
    absolute = path.resolve()
    tag = f"{path.name}.{zlib.crc32(str(absolute).encode()):08x}.tokens"
    if cache is not None:
        return [Path(cache).expanduser() / tag]
    return [absolute.with_name(f"{path.name}.tokens"), cache_folder() / tag]


def _read_footer(store: Path) -> _Footer:
    with store.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size < 16:
            raise ValueError(f"{store} is no encoded genome.")
        handle.seek(size - 16)
        length, magic = int.from_bytes(handle.read(8), "little"), handle.read(8)
        if magic != _MAGIC or length > size - 16:
            raise ValueError(f"{store} is no encoded genome.")
        handle.seek(size - 16 - length)
        values = json.loads(handle.read(length))
    contigs = [Contig(**contig) for contig in values.pop("contigs")]
    if sum(contig.length for contig in contigs) != size - 16 - length:
        raise ValueError(f"{store} is damaged.")
    return _Footer(contigs=contigs, **values)


def _checksum(handle: BinaryIO, size: int) -> int:
    value = 0
    while size > 0:
        block = handle.read(min(size, _BLOCK))
        if not block:
            return -1
        value = zlib.crc32(block, value)
        size -= len(block)
    return value


class _Encoder:
    """The state of one pass over a FASTA: where the contigs begin, what was counted."""

    def __init__(self, path: Path, out: IO[bytes]):
        self.path = path
        self.out = out
        self.contigs: list[Contig] = []
        self.names: set[str] = set()
        self.written = 0
        self.ambiguous = 0
        self.checksum = 0

    def header(self, line: bytes) -> None:
        self.close()
        words = line.decode("utf-8", "replace").split(None, 1)
        name = words[0] if words and not line[:1].isspace() else ""
        if not name or not name.isprintable():
            raise ValueError(f"{self.path}: the header {line[:60]!r} has no printable name after '>'.")
        if name in self.names:
            raise ValueError(f"{self.path}: contig {name!r} appears twice; names must be unique.")
        self.names.add(name)
        self.contigs.append(Contig(name, self.written, 0))

    def sequence(self, raw: bytes) -> None:
        codes = np.frombuffer(raw.translate(alphabet.ENCODE, b"\r\n"), dtype=np.uint8)
        if not self.contigs:
            if codes.size:
                raise ValueError(
                    f"{self.path} starts with {raw[:30]!r}, not with a header line '>name'; is it a FASTA file?"
                )
            return
        if codes.size and codes.max() == alphabet.INVALID:
            bad = raw.translate(None, b"\r\n")[int(np.argmax(codes == alphabet.INVALID))]
            raise ValueError(
                f"{self.path}, contig {self.contigs[-1].name!r}: {chr(bad)!r} is no nucleotide (IUPAC letters are"
                " allowed, in either case). Is it a protein or a damaged file?"
            )
        low = codes & np.uint8(0x7F)
        if codes.size and low.max() == alphabet.AMBIGUOUS:
            self.ambiguous += int(np.count_nonzero(low == alphabet.AMBIGUOUS))
            codes = alphabet.ambiguous_to_n(codes)
        self.checksum = zlib.crc32(codes.data, self.checksum)
        self.out.write(codes.data)
        self.written += codes.size

    def close(self) -> None:
        if self.contigs:
            last = self.contigs[-1]
            if self.written == last.offset:
                raise ValueError(f"{self.path}: contig {last.name!r} is empty.")
            self.contigs[-1] = Contig(last.name, last.offset, self.written - last.offset)


def _write_store(path: Path, out: IO[bytes], stat: os.stat_result) -> None:
    encoder = _Encoder(path, out)
    header: bytearray | None = None
    at_line_start = True
    for block in _blocks(path):
        position = 0
        while position < len(block):
            if header is not None:
                end = block.find(b"\n", position)
                header += block[position : end if end >= 0 else len(block)]
                if len(header) > _MAX_NAME:
                    raise ValueError(f"{path}: a header line is longer than {_MAX_NAME} characters.")
                if end < 0:
                    break
                encoder.header(bytes(header.rstrip(b"\r")))
                header, position, at_line_start = None, end + 1, True
            elif at_line_start and block[position] == ord(">"):
                header, position = bytearray(), position + 1
            else:
                following = block.find(b"\n>", position)
                stop = len(block) if following < 0 else following + 1
                encoder.sequence(block[position:stop])
                at_line_start = block[stop - 1] == ord("\n")
                position = stop
    if header is not None:
        encoder.header(bytes(header))
    encoder.close()
    if not encoder.contigs:
        raise ValueError(f"{path} is empty: no sequence was found in it.")
    if encoder.ambiguous > 0.5 * encoder.written:
        raise ValueError(
            f"{path}: {encoder.ambiguous} of {encoder.written} letters are ambiguous IUPAC codes; is it a protein file?"
        )
    if encoder.ambiguous:
        logger.info("%s: %d IUPAC letters are read as N", path, encoder.ambiguous)
    footer = json.dumps(asdict(_Footer(stat.st_size, stat.st_mtime_ns, encoder.checksum, encoder.contigs))).encode()
    out.write(footer + len(footer).to_bytes(8, "little") + _MAGIC)


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's text in blocks, decompressed where it is gzip; a gzip bomb is refused."""
    if not is_gzip(path):
        with path.open("rb") as handle:
            while block := handle.read(_BLOCK):
                yield block
        return
    total, size = 0, path.stat().st_size
    try:
        with gzip.open(path, "rb") as handle:
            while block := handle.read(_BLOCK):
                total += len(block)
                if total > max(_RATIO_FROM, size * _MAX_RATIO):
                    raise ValueError(
                        f"{path} unpacks to more than {_MAX_RATIO} times its size; no genome does. Unpack it by hand"
                        " if you trust it."
                    )
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}.") from None
