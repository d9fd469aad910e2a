"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: few trained values, saved with the head."""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from genossm.models.base import Backbone
from genossm.models.classifier import Classifier
from genossm.nn.head import HeadConfig
from genossm.nn.hyena import HyenaFilter
from genossm.ops.backend import installed

HEAD_FILE = "head.json"
_NAME = "default"
"""What peft calls the one adapter of a model."""


def add_adapters(model: Classifier, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Any:
    """Freeze a backbone and put adapters beside its linear layers, in place; the head is trained whole.

    Args:
        model: what is fine-tuned.
        rank: rank of each adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of the channels that no adapter of a layer sees, drawn for each batch.

    Returns:
        The peft model that holds `model`; `merge` turns it back.

    Raises:
        ValueError: peft is not installed, the rank is below 1, or the backbone has no linear layer wider than it.
    """
    if not installed("peft"):
        raise ValueError("finetune=lora needs peft: pip install 'genossm[peft]'; or take finetune=full or head.")
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(f"lora needs rank >= 1 and dropout in [0, 1); got {rank} and {dropout}.")
    import peft

    names = adaptable(model, rank)
    if not names:
        raise ValueError(
            f"{model.backbone.config.model_type} has no linear layer wider than lora.rank={rank}, so LoRA has nothing"
            " to adapt; lower lora.rank, or take finetune=full or finetune=head."
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=cast(Any, alpha), lora_dropout=dropout, target_modules=names, modules_to_save=["head"]
    )
    adapted = peft.get_peft_model(cast(Any, model), config)
    for layer in _adapted_layers(adapted):
        layer.merged_adapters = [_NAME]
        parametrize.register_parametrization(layer.base_layer, "weight", _Added(layer))
    return adapted


class _Added(nn.Module):
    """Adds an adapter to the weight that it stands beside, each time the weight is read.

    Fused layers read a weight without calling the layer that holds it, and peft's own way, to add the adapter's answer
    to the layer's, would pass those over in silence.
    """

    def __init__(self, layer: Any):
        super().__init__()
        # In a tuple, since the adapter's layer holds this module and is not to be held by it.
        self.adapter = (layer,)

    def forward(self, weight: Tensor) -> Tensor:
        (layer,) = self.adapter
        first_RD, second_CR = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        kept_D = layer.lora_dropout[_NAME](first_RD.new_ones(first_RD.shape[1]))
        return weight + (second_CR @ (first_RD * kept_D) * layer.scaling[_NAME]).to(weight.dtype)


def _adapted_layers(adapted: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in adapted.modules() if isinstance(module, LoraLayer)]


def adaptable(model: Classifier, rank: int) -> list[str]:
    """Return the names of the blocks' linear layers that an adapter of this rank makes smaller work of, each once.

    Left out are the network that makes Hyena's filters, which is no projection, and layers no wider than the rank.
    """
    apart: list[nn.Module] = [module for module in model.backbone.modules() if isinstance(module, HyenaFilter)]
    if model.backbone.lm_head is not None:
        apart.append(model.backbone.lm_head)
    spared = {id(child) for module in apart for child in module.modules()}
    return [
        f"backbone.{name}"
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in spared and min(module.weight.shape) > rank
    ]


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
    for layer in _adapted_layers(adapted):
        if parametrize.is_parametrized(layer.base_layer, "weight"):
            parametrize.remove_parametrizations(layer.base_layer, "weight", leave_parametrized=False)
            layer.merged_adapters.clear()
    return cast(Classifier, adapted.merge_and_unload()).eval()
