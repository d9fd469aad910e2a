"""Published StripedHyena and Evo-1: HuggingFace names (prefix `backbone.`) and those of the original code."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.striped_hyena import ACTIVATIONS, StripedHyenaConfig
from genossm.nn.head import HeadConfig


class StripedHyenaLayout(Layout):
    """StripedHyenaModelForCausalLM."""

    name = "stripedhyena"
    model_type = "striped_hyena"
    words: ClassVar[Mapping[str, str]] = {
        **{"d_model": "hidden_size", "n_layer": "num_layers", "n_head": "num_attention_heads", "d_state": "state_size"},
        **{"attn_layer_idx": "attn_layer_idxs", "short_filter_order": "short_filter_length"},
        **{"base": "rotary_emb_base", "scaling": "rotary_emb_scaling_factor"},
    }
    prefixes = ("backbone.",)
    keys = (
        ("embedding_layer.weight", "embedding.weight"),
        ("blocks.{i}.pre_norm.scale", "layers.{i}.norm1.weight"),
        ("blocks.{i}.projections.{p}", "layers.{i}.mixer.in_proj.{p}"),
        ("blocks.{i}.filter.short_filter_weight", "layers.{i}.mixer.short_filter.weight"),
        ("blocks.{i}.filter.short_filter_bias", "layers.{i}.mixer.short_filter.bias"),
        ("blocks.{i}.filter.poles", "layers.{i}.mixer.poles_DM2"),
        ("blocks.{i}.filter.residues", "layers.{i}.mixer.residues_DM2"),
        ("blocks.{i}.filter.D", "layers.{i}.mixer.skip_D"),
        ("blocks.{i}.filter.t", None),
        ("blocks.{i}.out_filter_dense.{p}", "layers.{i}.mixer.out_proj.{p}"),
        ("blocks.{i}.inner_mha_cls.Wqkv.{p}", "layers.{i}.mixer.in_proj.{p}"),
        ("blocks.{i}.inner_mha_cls.out_proj.{p}", "layers.{i}.mixer.out_proj.{p}"),
        ("blocks.{i}.inner_mha_cls.rotary_emb.inv_freq", None),
        ("blocks.{i}.post_norm.scale", "layers.{i}.norm2.weight"),
        ("blocks.{i}.mlp.l1.weight", "layers.{i}.mlp.fc1.weight"),
        ("blocks.{i}.mlp.l2.weight", "layers.{i}.mlp.up.weight"),
        ("blocks.{i}.mlp.l3.weight", "layers.{i}.mlp.fc2.weight"),
        ("norm.scale", "norm_f.weight"),
        ("unembed.weight", "lm_head.weight"),
    )

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        return values.get("model_type") == "stripedhyena" or "hyena_layer_idxs" in values

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> StripedHyenaConfig:
        n_layer, heads = config.whole("num_layers"), config.whole("num_attention_heads")
        attention, convolution = config.indices("attn_layer_idxs", []), config.indices("hyena_layer_idxs")
        if sorted(attention + convolution) != list(range(n_layer)):
            raise ValueError(
                f"attn_layer_idxs and hyena_layer_idxs must name each of {n_layer} layers once; got {attention} and"
                f" {convolution}."
            )
        groups = config.whole("proj_groups", 1)
        if heads % groups:
            raise ValueError(f"proj_groups must divide num_attention_heads={heads}; got {groups}.")
        config.require("hyena_filter_groups", [1], 1)
        config.require("smeared_gqa", [False], False)
        scaled = config.flag("use_interpolated_rotary_pos_emb", False)
        scaling = config.number("rotary_emb_scaling_factor", 1.0)
        self._ignore(config)
        shape = StripedHyenaConfig(
            d_model=config.whole("hidden_size"),
            n_layer=n_layer,
            n_head=heads,
            n_kv_head=heads // groups,
            attn_layer_idx=attention,
            d_state=config.whole("state_size"),
            d_inner=self._mlp_width(config),
            vocab_size=config.whole("vocab_size"),
            pad_vocab_size_multiple=1,
            tokenizer="evo",
            short_filter_order=config.whole("short_filter_length", 3),
            short_filter_bias=config.flag("short_filter_bias", True),
            activation=config.require("mlp_activation", ACTIVATIONS, "silu"),
            qkv_bias=config.flag("qkv_proj_bias", True),
            out_bias=config.flag("mha_out_proj_bias", True),
            column_split=config.flag("column_split_hyena", True),
            norm_eps=config.number("eps", 1e-6),
            final_norm=config.flag("final_norm", True),
            rotary_base=config.number("rotary_emb_base", 10_000),
            rotary_scaling=scaling if scaled else 1.0,
            tie_embeddings=config.flag("tie_embeddings", True),
        )
        config.finish()
        return shape

    @staticmethod
    def _mlp_width(config: PublishedConfig) -> int:
        width, multiple = config.whole_or_none("inner_mlp_size"), config.whole("inner_size_multiple_of", 64)
        return width if width is not None else -(-int(8 * config.whole("hidden_size") / 3) // multiple) * multiple

    @staticmethod
    def _ignore(config: PublishedConfig) -> None:
        """Mark what sets kernels, parallel runs and limits, not numbers."""
        config.ignore("column_split", "inference_mode", "log_intermediate_values", "make_vocab_size_divisible_by")
        config.ignore(
            "max_seqlen", "seqlen", "model_parallel_size", "pipe_parallel_size", "num_filters", "prefill_style"
        )
        config.ignore("split_k0", "use_flash_attn", "use_flash_attention_2", "use_flash_depthwise", "use_flash_rmsnorm")
        config.ignore(
            "use_flashfft", "print_activations", "max_batch_size", "tokenizer_type", "vocab_file", "use_cache"
        )
        config.ignore("rotary_percent", "tie_word_embeddings", "mlp_init_method", "mlp_output_init_method")

    def fit(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.squeeze(2) if name.endswith((".poles", ".residues")) else tensor

    def unfit(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(2) if name.endswith((".poles", ".residues")) else tensor

    def theirs(self, name: str, config: BackboneConfig) -> str | None:
        assert isinstance(config, StripedHyenaConfig)
        # Both kinds of mixer have projections of our names; theirs tell the kind.
        attends = name.startswith(tuple(f"layers.{i}.mixer." for i in config.attn_layer_idx))
        theirs = super().theirs(name, config)
        if theirs is not None and attends:
            theirs = theirs.replace(".projections.", ".inner_mha_cls.Wqkv.")
            return theirs.replace(".out_filter_dense.", ".inner_mha_cls.out_proj.")
        return theirs

    def full(self, name: str, head: HeadConfig | None) -> str:
        return f"backbone.{name}"

    def required(self, config: BackboneConfig, architecture: str) -> list[str]:
        return self.regenerable(config)

    def regenerable(self, config: BackboneConfig) -> list[str]:
        assert isinstance(config, StripedHyenaConfig)
        return [f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq" for i in config.attn_layer_idx]

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        config = backbone.config
        if not name.endswith("rotary_emb.inv_freq"):
            return None
        width = config.d_model // config.n_head
        return 1.0 / (config.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        return {
            "model_type": "stripedhyena",
            "architectures": ["StripedHyenaModelForCausalLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "proj_groups": config.n_head // (config.n_kv_head or config.n_head),
            "attn_layer_idxs": list(config.attn_layer_idx),
            "hyena_layer_idxs": [i for i in range(config.n_layer) if i not in config.attn_layer_idx],
            "state_size": config.d_state,
            "inner_mlp_size": config.mlp_width,
            "short_filter_length": config.short_filter_order,
            "short_filter_bias": config.short_filter_bias,
            "mlp_activation": config.activation,
            "qkv_proj_bias": config.qkv_bias,
            "mha_out_proj_bias": config.out_bias,
            "column_split_hyena": config.column_split,
            "eps": config.norm_eps,
            "final_norm": config.final_norm,
            "rotary_emb_base": config.rotary_base,
            "use_interpolated_rotary_pos_emb": config.rotary_scaling != 1,
            "rotary_emb_scaling_factor": config.rotary_scaling,
            "tie_embeddings": config.tie_embeddings,
            "hyena_filter_groups": 1,
        }
