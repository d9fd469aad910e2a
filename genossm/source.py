"""Where a model comes from: a folder, a file or a hub id; its tensors are read once and nothing in it is executed."""

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "weights.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "weights.ckpt",
)
"""Names of weights, the safest first."""

PINNED = {
    "togethercomputer/evo-1-8k-base": "1.1_fix",
    "togethercomputer/evo-1-131k-base": "1.1_fix",
}
"""Revisions of hub ids whose main branch holds weights that were later mended."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_MOST_BYTES_A_BYTE = 4


@dataclass(frozen=True)
class Source:
    """The files of a model on this machine."""

    name: str
    """What the user called it."""
    config: Path | None
    weights: Path

    def read_config(self) -> dict[str, Any]:
        """Return config.json as plain data.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON object, or asks for code.
        """
        if self.config is None:
            raise FileNotFoundError(
                f"{self.name} has no {CONFIG} beside its weights: the shape of a model is not guessed from its tensors."
            )
        try:
            values = json.loads(self.config.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.config} is no JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{self.config} must be a JSON object; it is a {type(values).__name__}.")
        refuse_targets(values, str(self.config))
        return values

    def read_tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Return every tensor by its published name; files are mapped into memory, each tensor is read once.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a file is damaged, is a bomb, holds more than tensors, or a shard stands outside the folder.
        """
        if self.weights.suffix != ".json":
            return read_file(self.weights, device)
        tensors: dict[str, Tensor] = {}
        for shard in shards(self.weights):
            refuse_outside(self.weights.parent, shard)
            tensors |= read_file(self.weights.parent / shard, device)
        return tensors


def find(source: str | Path, revision: str | None = None) -> Source:
    """Find the files of a model.

    Args:
        source: a folder, a file of weights with config.json beside it, or a hub id (`owner/name[@revision]`).
        revision: a branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: there is nothing of that name, or it holds no weights that we read.
        ValueError: a revision was given with a local path.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if _HUB_ID.fullmatch(str(source)):
            return fetch(str(source), revision)
        raise FileNotFoundError(f"{source} is no folder or file here, and no hub id (owner/name).")
    if revision is not None:
        raise ValueError(f"revision={revision!r} goes with a hub id; {source} is a local path.")
    if path.is_file():
        config = path.parent / CONFIG
        return Source(str(source), config if config.is_file() else None, path)
    for name in WEIGHTS:
        if (path / name).is_file():
            config = path / CONFIG
            return Source(str(source), config if config.is_file() else None, path / name)
    checkpoints = sorted(path.glob("*.ckpt"))
    if len(checkpoints) == 1:
        config = path / CONFIG
        return Source(str(source), config if config.is_file() else None, checkpoints[0])
    raise FileNotFoundError(f"{source} holds no weights; looked for {', '.join(WEIGHTS)} and one *.ckpt.")


def fetch(hub_id: str, revision: str | None = None) -> Source:
    """Fetch a model from the HuggingFace hub, or find it in its cache; code in the repository is not fetched.

    The hub's own settings hold: `HF_HUB_OFFLINE=1` never reaches for the network, `HF_HOME` says where the cache is.

    Raises:
        FileNotFoundError: there is no such model, it is not in the cache while offline, or it holds no weights.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    name, _, after = hub_id.partition("@")
    revision = revision or after or PINNED.get(name)

    def download(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision))

    try:
        config = download(CONFIG)
        for file in WEIGHTS:
            with contextlib.suppress(EntryNotFoundError):
                weights = download(file)
                for shard in shards(weights) if weights.suffix == ".json" else ():
                    download(shard)
                return Source(hub_id, config, weights)
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{hub_id} is not in the cache and the hub can't be reached (HF_HUB_OFFLINE, or no network)."
        ) from None
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise FileNotFoundError(f"The hub has no model {hub_id!r} that can be read: {error}.") from None
    raise FileNotFoundError(f"{hub_id} holds no weights; looked for {', '.join(WEIGHTS)}.")


def shards(index: Path) -> list[str]:
    """Return the files that an index of shards names, each once.

    Raises:
        ValueError: the index is damaged, or a name leads out of the folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}.") from None
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {name!r}: a shard must stand in the same folder.")
    return names


def refuse_outside(folder: Path, name: str) -> None:
    """Refuse a file that an index names and that is a link out of the folder; the hub's cache links to its own blobs.

    Raises:
        ValueError: it is.
    """
    inside, real = folder.resolve(), (folder / name).resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if not real.is_relative_to(inside) and not real.is_relative_to(blobs):
        raise ValueError(f"{folder / name} is a link to {real}: a shard must stand in the same folder.")


def read_file(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of one file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, is a bomb, or holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    return _read_safetensors(path, device) if path.suffix == ".safetensors" else _read_pickle(path, device)


def _read_safetensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from None


def _read_pickle(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    import pickle

    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_bomb(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} was not read: it is damaged or holds more than tensors and plain values, which could run code"
            f" ({reason})"
        ) from None
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{path} holds values that are no tensors: {', '.join(odd[:8])}.")
    return {str(name): value.detach() for name, value in content.items()}


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = path.stat().st_size
    if unpacked > _MOST_BYTES_A_BYTE * packed + 2**20:
        raise ValueError(f"{path} would unpack {packed} bytes to {unpacked}: it was not opened.")


def refuse_targets(values: object, source: str) -> None:
    """Refuse a config that names something to be called; what comes from others is data.

    Raises:
        ValueError: a key `_target_` stands somewhere in it.
    """
    for key in _keys(values):
        if key == "_target_":
            raise ValueError(f"{source} holds a _target_: a model's config is data and names nothing to run.")


def _keys(values: object) -> Iterator[object]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield key
            yield from _keys(value)
    elif isinstance(values, list):
        for value in values:
            yield from _keys(value)
