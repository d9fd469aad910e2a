"""`genossm convert`: published checkpoints to ours and back, and ours to folders that transformers opens."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from genossm import checkpoint, published
from genossm.files import write_folder_atomically
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.published import Origin
from genossm.source import find, read_file

ORIGIN, KEPT = "origin.json", "origin.safetensors"
"""What a converted folder remembers of the published file, so that the way back gives the same file."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: str
    layout: str
    tensors: int
    parameters: int
    written: bool
    """False after a dry run."""

    def summary(self) -> dict[str, Any]:
        """Return plain values, for printing."""
        return asdict(self)


def convert(
    source: Annotated[str, typer.Argument(help="a folder, a file or a hub id, ours or published")],
    target: Annotated[str, typer.Argument(help="the folder to write")],
    *,
    to: str = "genossm",
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Converted:
    """Convert a checkpoint: `--to genossm`, `--to original` (back), `--to hf`, or a layout's name.

    For example `genossm convert state-spaces/mamba-130m ours`, then `genossm convert ours back --to original`, or
    `genossm convert ours shared --to hf`. A folder that is there is not replaced unless `--overwrite` is given; it is
    written whole or not at all. `--dry-run` says what would be written.

    What came from a published file goes back to it bit for bit, key for key. `hf` is a folder that transformers opens
    with `trust_remote_code=True`, on a machine without genossm.

    Args:
        source: a folder, a file or a hub id, ours or published.
        target: the folder to write.
        to: "genossm", "original", "hf", or one of `genossm.published.layouts()`.
        revision: a branch, tag or commit of a hub id.
        overwrite: replace the folder if it is there and holds a model.
        dry_run: read the source and check that it can be written, but write nothing.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the target is there, or holds something else than a model, or the layout can't hold the model.
    """
    folder = Path(target)
    _check_target(folder, overwrite)
    model, origin = _open(source, revision)
    if to == "original":
        if origin is None:
            raise ValueError(f"{source} did not come from a published file; name a layout instead of 'original'.")
        to = origin.layout
    if to == "genossm":
        count, write = len(model.state_dict()), partial(_write_ours, model, origin, source)
    elif to == "hf":
        from genossm import huggingface

        notes = _notes(source, origin)
        count, write = len(huggingface.named_tensors(model)), partial(huggingface.write_files, model, notes)
    else:
        config, named = published.write(model, to, origin)
        count, write = len(named), partial(_write_published, config, named)
    if not dry_run:
        write_folder_atomically(folder, write)
    backbone = model.backbone if isinstance(model, Classifier) else model
    return Converted(str(folder), to, count, backbone.num_parameters(), not dry_run)


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target that is there, or that holds something else than a model."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{folder} is there already; choose another folder or give --overwrite.")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / checkpoint.CONFIG).is_file()):
        raise ValueError(f"{folder} holds no model, so it is not replaced; choose another folder.")


def _open(source: str, revision: str | None) -> tuple[Backbone | Classifier, Origin | None]:
    found = find(source, revision)
    values = found.read_config()
    if "genossm_version" not in values:
        imported = published.read(found)
        return imported.classifier or imported.backbone, imported.origin
    opened = checkpoint.load_classifier if checkpoint.has_head(values) else checkpoint.load
    return opened(source, revision=revision), _read_origin(found.weights.parent)


def _read_origin(folder: Path) -> Origin | None:
    """Return what a converted folder remembers, or None where it was not converted.

    Raises:
        ValueError: the file is damaged.
    """
    path, kept = folder / ORIGIN, folder / KEPT
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        origin = Origin(values["layout"], dict(values["config"]), dict(values["dtypes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Convert the published file again.") from None
    origin.kept = read_file(kept) if kept.is_file() else {}
    return origin


def _notes(source: str, origin: Origin | None) -> dict[str, Any]:
    """Return what is known of a model's making: its own notes, and the published file that it comes from."""
    values = find(source).read_config() if Path(source).exists() else {}
    notes = values.get("notes")
    known = notes if isinstance(notes, dict) else {}
    return known if origin is None else {"source": source, "layout": origin.layout, **known}


def _write_ours(model: Backbone | Classifier, origin: Origin | None, source: str, folder: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.save(model, folder, {"source": source, **_notes(source, origin)})
    if origin is not None:
        remembered = {"layout": origin.layout, "config": origin.config, "dtypes": origin.dtypes}
        (folder / ORIGIN).write_text(json.dumps(remembered, indent=1) + "\n")
        stored = published.irreplaceable(origin, model.backbone if isinstance(model, Classifier) else model)
        if stored:
            save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / KEPT)


def _write_published(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Names of one tensor are stored apart: safetensors refuses memory that is shared.
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})
