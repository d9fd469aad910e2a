"""`genossm convert`: published checkpoints to ours and back, and ours to folders that transformers opens."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from genossm import checkpoint, published
from genossm.files import write_atomically
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.published import Origin
from genossm.source import find

ORIGIN, KEPT = "origin.json", "origin.safetensors"
"""What a converted folder remembers of the published file, so that the way back gives the same file."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: str
    layout: str
    tensors: int
    parameters: int

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
) -> Converted:
    """Convert a checkpoint: `--to genossm`, `--to original` (back), `--to hf`, or a layout's name.

    For example `genossm convert state-spaces/mamba-130m ours`, then `genossm convert ours back --to original`, or
    `genossm convert ours shared --to hf`. A folder that is there is not replaced unless `--overwrite` is given.

    What came from a published file goes back to it bit for bit, key for key. `hf` is a folder that transformers opens
    with `trust_remote_code=True`, on a machine without genossm.

    Args:
        source: a folder, a file or a hub id, ours or published.
        target: the folder to write.
        to: "genossm", "original", "hf", or one of `genossm.published.layouts()`.
        revision: a branch, tag or commit of a hub id.
        overwrite: replace the folder if it is there.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the target is there, or the layout can't hold the model.
    """
    folder = Path(target)
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} is there already; choose another folder or give --overwrite.")
    model, origin = _open(source, revision)
    if to == "original":
        if origin is None:
            raise ValueError(f"{source} did not come from a published file; name a layout instead of 'original'.")
        to = origin.layout
    if to == "genossm":
        _write_ours(model, origin, source, folder)
        tensors = len(model.state_dict())
    elif to == "hf":
        from genossm.huggingface import write_folder

        tensors = write_folder(model, folder, _notes(source))
    else:
        config, named = published.write(model, to, origin)
        _write_published(config, named, folder)
        tensors = len(named)
    backbone = model.backbone if isinstance(model, Classifier) else model
    return Converted(str(folder), to, tensors, backbone.num_parameters())


def _open(source: str, revision: str | None) -> tuple[Backbone | Classifier, Origin | None]:
    found = find(source, revision)
    values = found.read_config()
    if "genossm_version" not in values:
        imported = published.read(found)
        return imported.classifier or imported.backbone, imported.origin
    model = checkpoint.load_classifier(source) if checkpoint.HEAD in values else checkpoint.load(source)
    path = found.weights.parent / ORIGIN
    if not path.is_file():
        return model, None
    from safetensors.torch import load_file

    kept = found.weights.parent / KEPT
    return model, Origin(**json.loads(path.read_text()), kept=load_file(kept) if kept.is_file() else {})


def _notes(source: str) -> dict[str, Any]:
    values = find(source).read_config() if Path(source).exists() else {}
    notes = values.get("notes")
    return notes if isinstance(notes, dict) else {}


def _write_ours(model: Backbone | Classifier, origin: Origin | None, source: str, folder: Path) -> None:
    from safetensors.torch import save_file

    notes = {"source": source} if origin is None else {"source": source, "layout": origin.layout}
    checkpoint.save(model, folder, {**_notes(source), **notes})
    if origin is not None:
        remembered = {"layout": origin.layout, "config": origin.config, "dtypes": origin.dtypes}
        write_atomically(folder / ORIGIN, lambda path: path.write_text(json.dumps(remembered, indent=1) + "\n"))
        stored = published.irreplaceable(origin, model.backbone if isinstance(model, Classifier) else model)
        if stored:
            save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / KEPT)


def _write_published(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Names of one tensor are stored apart: safetensors refuses memory that is shared.
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})
