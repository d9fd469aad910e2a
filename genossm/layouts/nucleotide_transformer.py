"""Published Nucleotide Transformers and ESM-2: the layout of transformers' ESM, which all of them have."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.nn.head import HeadConfig

_TOKENIZERS = {4105: "nt_v1", 4107: "nt_v2", 33: "esm2"}


class EsmLayout(Layout):
    """EsmModel, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification."""

    name = "esm"
    model_type = "nucleotide_transformer"
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
        shape = NucleotideTransformerConfig(
            d_model=config.whole("hidden_size"),
            n_layer=config.whole("num_hidden_layers"),
            n_head=config.whole("num_attention_heads"),
            d_inner=config.whole("intermediate_size"),
            vocab_size=vocab_size,
            pad_vocab_size_multiple=1,
            tokenizer=_TOKENIZERS.get(vocab_size, "nt_v2"),
            positions=config.require("position_embedding_type", ["absolute", "rotary"], "absolute"),
            max_positions=config.whole("max_position_embeddings", 1026),
            activation="swiglu" if gated else "gelu",
            mlp_bias=bool(config.take("add_bias_fnn", True)),
            norm_before=bool(config.take("emb_layer_norm_before", None)),
            rescale_masked=bool(config.take("token_dropout", False)),
            pad_id=config.whole("pad_token_id", 1),
            mask_id=config.whole("mask_token_id", 2),
            layer_norm_eps=float(config.take("layer_norm_eps", 1e-12)),
            residual_dropout=float(config.take("hidden_dropout_prob", 0.1)),
            attention_dropout=float(config.take("attention_probs_dropout_prob", 0.1)),
            with_lm_head=has_head,
            tie_embeddings=has_head and bool(config.take("tie_word_embeddings", True)),
        )
        config.ignore("tie_word_embeddings")
        config.finish()
        return shape

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        dropout = config.values.get("classifier_dropout") or config.values.get("hidden_dropout_prob") or 0.0
        if "classifier.out_proj.weight" in tensors:
            return HeadConfig(n_outputs=config.n_labels, pooling="first", hidden=True, dropout=float(dropout))
        if "classifier.weight" in tensors:
            return HeadConfig(n_outputs=config.n_labels, pooling="none", dropout=float(dropout))
        return None

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        architecture = "EsmForMaskedLM" if config.with_lm_head else "EsmModel"
        if head is not None:
            architecture = f"EsmFor{'Token' if head.pooling == 'none' else 'Sequence'}Classification"
        labels = {} if head is None else {"id2label": {str(i): f"LABEL_{i}" for i in range(head.n_outputs)}}
        return {
            "model_type": "esm",
            "architectures": [architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "intermediate_size": config.d_inner,
            "position_embedding_type": config.positions,
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
            **labels,
        }

    def full(self, name: str, head: HeadConfig | None) -> str:
        if head is not None and not head.hidden:
            name = name.replace("classifier.out_proj.", "classifier.")
        return name if name.startswith(("lm_head.", "classifier.")) else f"esm.{name}"

    def regenerable(self, config: BackboneConfig) -> list[str]:
        assert isinstance(config, NucleotideTransformerConfig)
        if config.positions != "rotary":
            return []
        return [f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(config.n_layer)]

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        config = backbone.config
        if name.endswith("inv_freq"):
            width = config.d_model // config.n_head
            return 1.0 / (10000 ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
        if name == "embeddings.position_ids":
            return torch.arange(config.max_positions)[None]
        return None
