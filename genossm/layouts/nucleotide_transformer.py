"""Published Nucleotide Transformers and ESM-2: the layout of transformers' ESM, which all of them have."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig, check_export, label_keys, labelled
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.nn.head import HeadConfig

_LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_TOKENIZERS = {4105: "nt_v1", 4107: "nt_v2", 33: "esm2"}


class EsmLayout(Layout):
    """EsmModel, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification."""

    name = "esm"
    model_type = "nucleotide_transformer"
    words: ClassVar[Mapping[str, str]] = {
        **{"d_model": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
        **{"d_inner": "intermediate_size", "max_positions": "max_position_embeddings", "pad_id": "pad_token_id"},
        **{"base": "rope_theta"},
        **{"mask_id": "mask_token_id", "residual_dropout": "hidden_dropout_prob"},
        **{"attention_dropout": "attention_probs_dropout_prob"},
    }
    prefixes = ("esm.",)
    keys = (
        ("embeddings.word_embeddings.weight", "embedding.weight"),
        # With rotary positions the table is in the file and nothing reads it.
        ("embeddings.position_embeddings.weight", "position_embedding.weight?"),
        ("embeddings.position_ids", None),
        ("embeddings.layer_norm.{p}", "norm_before.{p}"),
        ("encoder.layer.{i}.attention.LayerNorm.{p}", "layers.{i}.norm1.{p}"),
        ("encoder.layer.{i}.attention.self.query.{p}", "layers.{i}.mixer.query.{p}"),
        ("encoder.layer.{i}.attention.self.key.{p}", "layers.{i}.mixer.key.{p}"),
        ("encoder.layer.{i}.attention.self.value.{p}", "layers.{i}.mixer.value.{p}"),
        ("encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq", None),
        # transformers 5 has one for all layers, and some of its releases save it under a pattern of the old names.
        ("rotary_embeddings.inv_freq", None),
        ("encoder.layer.*.attention.self.rotary_embeddings.inv_freq", None),
        ("encoder.layer.{i}.attention.output.dense.{p}", "layers.{i}.mixer.out_proj.{p}"),
        ("encoder.layer.{i}.LayerNorm.{p}", "layers.{i}.norm2.{p}"),
        ("encoder.layer.{i}.intermediate.dense.{p}", "layers.{i}.mlp.fc1.{p}"),
        ("encoder.layer.{i}.output.dense.{p}", "layers.{i}.mlp.fc2.{p}"),
        ("encoder.emb_layer_norm_after.{p}", "norm_f.{p}"),
        ("contact_head.regression.{p}", None),
        ("pooler.dense.{p}", None),
        ("lm_head.dense.{p}", "lm_head.dense.{p}"),
        ("lm_head.layer_norm.{p}", "lm_head.layer_norm.{p}"),
        ("lm_head.decoder.weight", "lm_head.decoder.weight"),
        ("lm_head.bias", "lm_head.bias"),
        # transformers ties the decoder's own bias to the head's.
        ("lm_head.decoder.bias", "lm_head.bias"),
        ("classifier.dense.{p}", "head.dense.{p}"),
        ("classifier.out_proj.{p}", "head.out.{p}"),
        ("classifier.{p}", "head.out.{p}"),
    )

    def bare(self, name: str) -> str:
        # The names of TensorFlow, which transformers 5 reads and, in some of its releases, writes.
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda match: _LAYER_NORM[match[0]], super().bare(name))

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        return values.get("model_type") == "esm"

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> NucleotideTransformerConfig:
        vocab_size = config.whole("vocab_size")
        config.require("hidden_act", ["gelu"], "gelu")
        for key in ("is_folding_model", "add_cross_attention", "is_decoder"):
            config.require(key, [False], False)
        config.ignore("esmfold_config", "vocab_list", "classifier_dropout", "bos_token_id", "eos_token_id")
        gated = "encoder.layer.0.intermediate.dense.weight" in tensors and (
            tensors["encoder.layer.0.intermediate.dense.weight"].shape[0] == 2 * config.whole("intermediate_size")
        )
        has_head = "lm_head.dense.weight" in tensors or config.architecture.endswith("MaskedLM")
        config.check_head("SequenceClassification", "classifier.out_proj.weight", tensors)
        config.check_head("TokenClassification", "classifier.weight", tensors)
        shape = NucleotideTransformerConfig(
            d_model=config.whole("hidden_size"),
            n_layer=config.whole("num_hidden_layers"),
            n_head=config.whole("num_attention_heads"),
            d_inner=config.whole("intermediate_size"),
            vocab_size=vocab_size,
            pad_vocab_size_multiple=1,
            tokenizer=_TOKENIZERS.get(vocab_size, "nt_v2"),
            positions=config.require("position_embedding_type", ["absolute", "rotary"], "absolute"),
            rotary_base=config.number("rope_theta", 10_000.0),
            max_positions=config.whole("max_position_embeddings", 1026),
            activation="swiglu" if gated else "gelu",
            mlp_bias=config.flag("add_bias_fnn", True),
            norm_before=config.flag("emb_layer_norm_before", False),
            rescale_masked=config.flag("token_dropout", False),
            pad_id=config.whole("pad_token_id", 1, least=0),
            mask_id=config.whole("mask_token_id", 2, least=0),
            layer_norm_eps=config.number("layer_norm_eps", 1e-12),
            residual_dropout=config.number("hidden_dropout_prob", 0.1),
            attention_dropout=config.number("attention_probs_dropout_prob", 0.1),
            with_lm_head=has_head,
            tie_embeddings=has_head and config.flag("tie_word_embeddings", True),
        )
        config.ignore("tie_word_embeddings")
        config.finish()
        return shape

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        # Of the two classifiers the first knows one dropout, the second one of its own.
        dropout = config.number("hidden_dropout_prob", 0.1)
        if "classifier.out_proj.weight" in tensors:
            return HeadConfig(**labelled(config.labels), pooling="first", hidden=True, dropout=dropout)
        if "classifier.weight" in tensors:
            own = dropout if config.take("classifier_dropout", None) is None else config.number("classifier_dropout")
            return HeadConfig(**labelled(config.labels), pooling="none", dropout=own)
        return None

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        architecture = "EsmForMaskedLM" if config.with_lm_head else "EsmModel"
        if head is not None:
            check_export(head, ["first", "none"], hidden=head.pooling == "first", bias=True)
            architecture = f"EsmFor{'Token' if head.pooling == 'none' else 'Sequence'}Classification"
        return {
            "model_type": "esm",
            "architectures": [architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "intermediate_size": config.d_inner,
            "position_embedding_type": config.positions,
            "rope_theta": config.rotary_base,
            "max_position_embeddings": config.max_positions,
            "add_bias_fnn": config.mlp_bias,
            "emb_layer_norm_before": config.norm_before,
            "token_dropout": config.rescale_masked,
            "pad_token_id": config.pad_id,
            "mask_token_id": config.mask_id,
            "layer_norm_eps": config.layer_norm_eps,
            "hidden_dropout_prob": config.residual_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "tie_word_embeddings": config.tie_embeddings,
            **label_keys(head),
        }

    def full(self, name: str, head: HeadConfig | None) -> str:
        if head is not None and not head.hidden:
            name = name.replace("classifier.out_proj.", "classifier.")
        return name if name.startswith(("lm_head.", "classifier.")) else f"esm.{name}"

    def misfit(self, name: str, tensor: Tensor, backbone: Backbone) -> str | None:
        config = backbone.config
        maps, width = config.n_layer * config.n_head, config.d_model
        shapes = {
            "contact_head.regression.weight": (1, maps),
            "contact_head.regression.bias": (1,),
            "pooler.dense.weight": (width, width),
            "pooler.dense.bias": (width,),
            "embeddings.position_embeddings.weight": (config.max_positions, width),
        }
        if name in shapes and tensor.shape != shapes[name]:
            return f"has shape {tuple(tensor.shape)} instead of {shapes[name]}"
        if name in shapes and not tensor.is_floating_point():
            return f"has type {tensor.dtype} instead of a floating one"
        return super().misfit(name, tensor, backbone)

    def regenerable(self, config: BackboneConfig) -> list[str]:
        assert isinstance(config, NucleotideTransformerConfig)
        if config.positions != "rotary":
            return []
        return [f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(config.n_layer)]

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        config = backbone.config
        if name.endswith("inv_freq"):
            width = config.d_model // config.n_head
            return 1.0 / (config.rotary_base ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
        if name == "embeddings.position_ids":
            return torch.arange(config.max_positions)[None]
        return None
