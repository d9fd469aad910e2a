"""Published Caduceus, Ph and PS, and PlantCaduceus."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig, check_export, label_keys, labelled
from genossm.layouts.mamba import MIXER, first_generation
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.caduceus import CaduceusConfig
from genossm.nn.head import HeadConfig
from genossm.nn.mamba import STRATEGIES

logger = logging.getLogger(__name__)


class CaduceusPh(Layout):
    """Caduceus, CaduceusForMaskedLM, CaduceusForSequenceClassification on one strand."""

    name = "caduceus-ph"
    model_type = "caduceus"
    prefixes = ("caduceus.",)
    rcps = False
    keys = (
        ("backbone.embeddings.word_embeddings.weight", "embedding.weight"),
        *(
            (f"backbone.layers.{{i}}.mixer.mamba_{way}.{name}", f"layers.{{i}}.mixer.mamba_{way}.{name}")
            for way in ("fwd", "rev")
            for name in MIXER
        ),
        ("backbone.layers.{i}.norm.{p}", "layers.{i}.norm1.{p}"),
        ("backbone.norm_f.{p}", "norm_f.{p}"),
        ("lm_head.weight", "lm_head.weight"),
        ("score.weight", "head.out.weight"),
    )

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        rcps = values.get("rcps", False)
        if values.get("model_type") == "caduceus" and not isinstance(rcps, bool):
            raise ValueError(f"rcps must be true or false in the config of a Caduceus; got {rcps!r}.")
        return values.get("model_type") == "caduceus" and rcps == self.rcps

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> CaduceusConfig:
        ssm = config.section("ssm_cfg")
        ssm.require("layer", ["Mamba1", None], None)
        ssm.ignore("use_fast_path")
        config.ignore("rcps", "residual_in_fp32", "initializer_cfg")
        vocab_size, multiple = config.whole("vocab_size"), config.whole("pad_vocab_size_multiple", 8)
        has_head = any(name.startswith("lm_head.") and name.endswith("weight") for name in tensors)
        config.check_head("SequenceClassification", "score.weight", tensors)
        tied = config.flag("tie_word_embeddings", True)
        shape = CaduceusConfig(
            d_model=config.whole("d_model"),
            n_layer=config.whole("n_layer"),
            vocab_size=vocab_size,
            pad_vocab_size_multiple=multiple,
            tokenizer="plantcaduceus" if vocab_size == 8 else "char",
            d_state=ssm.whole("d_state", 16),
            d_conv=ssm.whole("d_conv", 4),
            expand=ssm.whole("expand", 2),
            bias=ssm.flag("bias", False),
            conv_bias=ssm.flag("conv_bias", True),
            **first_generation(ssm),
            rms_norm=config.flag("rms_norm", True),
            norm_epsilon=config.number("norm_epsilon", 1e-5),
            bidirectional=config.flag("bidirectional", True),
            bidirectional_strategy=config.require("bidirectional_strategy", [*STRATEGIES, None], None) or "add",
            bidirectional_weight_tie=config.flag("bidirectional_weight_tie", True),
            rcps=self.rcps,
            fused_add_norm=config.flag("fused_add_norm", True),
            complement_map=_complement_map(config, tensors, vocab_size, -(-vocab_size // multiple) * multiple),
            tie_embeddings=tied if config.architecture.endswith("MaskedLM") else tied or not has_head,
        )
        ssm.finish()
        config.finish()
        return shape

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        if "score.weight" not in tensors:
            return None
        return HeadConfig(**labelled(config.labels), bias=False, strands=2 if self.rcps else 1)

    def stand_in(self, name: str) -> str | None:
        for leaf in (".in_proj.", ".out_proj."):
            if f".mamba_rev{leaf}" in name:
                return name.replace(".mamba_rev.", ".mamba_fwd.")
        return name.replace(".mamba_fwd.", ".") if ".mamba_fwd." in name else super().stand_in(name)

    def theirs(self, name: str, config: BackboneConfig) -> str | None:
        assert isinstance(config, CaduceusConfig)
        if not config.bidirectional:
            name = name.replace(".mixer.", ".mixer.mamba_fwd.")
        return super().theirs(name, config)

    def full(self, name: str, head: HeadConfig | None) -> str:
        return f"caduceus.{name}" if name.startswith("backbone.") else name

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        if config.rcps != self.rcps:
            raise ValueError(f"Layout {self.name} has rcps={self.rcps}; the model has rcps={config.rcps}.")
        if head is not None:
            check_export(head, ["mean", "max", "first", "last"], bias=False, strands=2 if self.rcps else 1)
        ssm = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
        names = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "rms_norm", "norm_epsilon")
        ways = ("fused_add_norm", "bidirectional", "bidirectional_strategy", "bidirectional_weight_tie", "rcps")
        return {
            "model_type": "caduceus",
            "architectures": ["CaduceusForMaskedLM" if head is None else "CaduceusForSequenceClassification"],
            **{name: getattr(config, name) for name in (*names, *ways)},
            "ssm_cfg": {name: getattr(config, name) for name in (*ssm, "bias", "conv_bias")},
            "complement_map": {str(i): other for i, other in enumerate(backbone.complement_V.tolist())},  # type: ignore[union-attr, operator]
            "residual_in_fp32": False,
            "pad_token_id": 4,
            "tie_word_embeddings": config.tie_embeddings,
            **label_keys(head),
        }


class CaduceusPS(CaduceusPh):
    """The same classes on both strands; names differ where the norms are not fused."""

    name = "caduceus-ps"
    rcps = True
    keys = (
        ("backbone.embeddings.word_embeddings.embedding.weight", "embedding.weight"),
        ("backbone.embeddings.word_embeddings.complement_map", None),
        *(
            (f"backbone.layers.{{i}}.mixer.submodule.mamba_{way}.{name}", f"layers.{{i}}.mixer.mamba_{way}.{name}")
            for way in ("fwd", "rev")
            for name in MIXER
        ),
        ("backbone.layers.{i}.norm.{p}", "layers.{i}.norm1.{p}"),
        ("backbone.layers.{i}.norm.submodule.{p}", "layers.{i}.norm1.{p}"),
        ("backbone.norm_f.{p}", "norm_f.norm.{p}"),
        ("backbone.norm_f.submodule.{p}", "norm_f.norm.{p}"),
        ("lm_head.lm_head.weight", "lm_head.weight"),
        ("lm_head.complement_map", None),
        ("score.weight", "head.out.weight"),
    )

    def theirs(self, name: str, config: BackboneConfig) -> str | None:
        assert isinstance(config, CaduceusConfig)
        theirs = super().theirs(name, config)
        if theirs is None or config.fused_add_norm:
            return theirs
        return theirs.replace(".norm.", ".norm.submodule.").replace(".norm_f.", ".norm_f.submodule.")

    def regenerable(self, config: BackboneConfig) -> list[str]:
        return ["backbone.embeddings.word_embeddings.complement_map", "lm_head.complement_map"]

    def required(self, config: BackboneConfig, architecture: str) -> list[str]:
        embedding, head = self.regenerable(config)
        return [embedding, head] if architecture.endswith("MaskedLM") else [embedding]

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        if not name.endswith("complement_map"):
            return None
        complement_V = backbone.complement_V
        assert isinstance(complement_V, Tensor)
        return complement_V.to(torch.int64)


def _complement_map(
    config: PublishedConfig, tensors: Mapping[str, Tensor], vocab_size: int, rows: int
) -> tuple[int, ...]:
    """Return the complement of each id: of the file's buffer, else of the config, whose order may have been lost."""
    written = config.take("complement_map", None)
    by_id = range(vocab_size) if written is None else _by_id(written, config.source)
    for name, tensor in tensors.items():
        if name.endswith("complement_map"):
            if tensor.shape != (rows,) or tensor.is_floating_point():
                kind = f"shape {tuple(tensor.shape)} and type {tensor.dtype}"
                raise ValueError(f"{name} of {config.source} must hold {rows} ids; it has {kind}.")
            stored = tuple(tensor.tolist())
            if written is not None and tuple(by_id) != stored[: len(by_id)]:
                logger.warning(
                    "complement_map of %s differs from the one in the weights, %s, which is taken.",
                    config.source,
                    list(stored),
                )
            return stored
    return tuple(by_id)


def _by_id(written: Any, source: str) -> tuple[int, ...]:
    ids = [str(key) for key in written] if isinstance(written, Mapping) else []
    whole = isinstance(written, Mapping) and all(type(value) is int for value in written.values())
    if not whole or not ids or sorted(ids) != sorted(str(i) for i in range(len(ids))):
        raise ValueError(f"complement_map in the config of {source} must give each id from 0 on its complement.")
    return tuple(written[key] for key in sorted(written, key=int))
