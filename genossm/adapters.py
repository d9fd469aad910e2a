"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: few trained values, saved with the head."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.ops.backend import installed

HEAD_FILE = "head.json"


def add_adapters(model: Classifier, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Any:
    """Freeze a backbone and put adapters beside its linear layers, in place; the head is trained whole.

    Args:
        model: what is fine-tuned.
        rank: rank of each adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: dropout of what enters an adapter.

    Returns:
        The peft model that holds `model`; `merge` turns it back.

    Raises:
        ValueError: peft is not installed, or the backbone has no linear layer that could take an adapter.
    """
    if not installed("peft"):
        raise ValueError("finetune=lora needs peft: pip install 'genossm[peft]'; or take finetune=full or head.")
    import peft

    names = called_linears(model)
    if not names:
        raise ValueError(
            f"{model.backbone.config.model_type} calls no linear layer, so LoRA has nothing to adapt; take"
            " finetune=full or finetune=head."
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=cast(Any, alpha), lora_dropout=dropout, target_modules=names, modules_to_save=["head"]
    )
    return peft.get_peft_model(cast(Any, model), config)


def called_linears(model: Classifier) -> list[str]:
    """Return the names of the blocks' linear layers that a forward pass calls, each once.

    A fused kernel may read a layer's weight without calling it, and then an adapter would be passed over in silence;
    a layer shared by two places would be adapted in one of them alone. Neither gets an adapter.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name.startswith("backbone.layers."):
            places.setdefault(module, []).append(name)
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        called.add(module)

    hooks = [module.register_forward_hook(note) for module in places]
    training = model.training
    try:
        with torch.no_grad():
            ids_BL = torch.full((1, 16), 7, device=next(model.parameters()).device)
            model.eval()(ids_BL)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [names[0] for module, names in places.items() if module in called and len(names) == 1]


def save_adapters(adapted: Any, head: HeadConfig, folder: Path) -> None:
    """Write adapters, head and the head's shape to a folder, in peft's own format."""
    adapted.save_pretrained(str(folder))
    (folder / HEAD_FILE).write_text(json.dumps(head.to_dict(), indent=2) + "\n")


def load_adapters(backbone: Backbone, folder: str | Path) -> Classifier:
    """Put saved adapters and their head on the backbone that they were trained on.

    Args:
        backbone: the pretrained backbone; its weights are changed in place.
        folder: what `save_adapters` wrote.

    Returns:
        The model with the adapters merged in, in eval mode.

    Raises:
        FileNotFoundError: the folder holds no adapters.
        ValueError: peft is not installed.
    """
    folder = Path(folder)
    if not (folder / HEAD_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no adapters: it has no {HEAD_FILE}.")
    if not installed("peft"):
        raise ValueError("Adapters need peft: pip install 'genossm[peft]'.")
    import peft

    model = Classifier(backbone, HeadConfig.from_dict(json.loads((folder / HEAD_FILE).read_text())))
    return merge(peft.PeftModel.from_pretrained(cast(Any, model), str(folder)))


def merge(adapted: Any) -> Classifier:
    """Add the adapters to the weights that they stand beside and return the plain model, in eval mode."""
    return cast(Classifier, adapted.merge_and_unload()).eval()
