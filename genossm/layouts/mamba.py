"""Published Mamba and Mamba-2: the state-spaces files and those of transformers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.mamba import Mamba2Config, MambaConfig
from genossm.nn.head import HeadConfig

MIXER = ("in_proj.{p}", "conv1d.{p}", "x_proj.weight", "dt_proj.{p}", "A_log", "D", "out_proj.{p}")
"""Tensors of a Mamba mixer; theirs and ours have the same names."""
_SHARED = (
    *((f"backbone.layers.{{i}}.mixer.{name}", f"layers.{{i}}.mixer.{name}") for name in MIXER),
    ("backbone.layers.{i}.mixer.dt_bias", "layers.{i}.mixer.dt_bias"),
    ("backbone.layers.{i}.mixer.norm.weight", "layers.{i}.mixer.norm.weight"),
    ("backbone.layers.{i}.norm.{p}", "layers.{i}.norm1.{p}"),
    ("backbone.layers.{i}.norm2.{p}", "layers.{i}.norm2.{p}"),
    ("backbone.layers.{i}.mlp.fc1.weight", "layers.{i}.mlp.fc1.weight"),
    ("backbone.layers.{i}.mlp.fc2.weight", "layers.{i}.mlp.fc2.weight"),
    ("backbone.norm_f.{p}", "norm_f.{p}"),
    ("lm_head.weight", "lm_head.weight"),
)


def limit(config: PublishedConfig, key: str) -> tuple[float, float | None]:
    """Return the limits of the step sizes; an infinite upper one, in whatever spelling, is none.

    Raises:
        ValueError: they are no two numbers.
    """
    values = config.take(key, (0.0, math.inf))
    try:
        low, high = (math.inf if value is None else float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be two numbers in the config of {config.source}; got {values!r}.") from None
    return low, None if math.isinf(high) else high


def steps(config: PublishedConfig, low: str, high: str, floor: str) -> dict[str, Any]:
    """Return how a fresh layer draws its step sizes."""
    numbers = (config.number(low, 1e-3), config.number(high, 0.1), config.number(floor, 1e-4))
    return dict(zip(("dt_min", "dt_max", "dt_init_floor"), numbers, strict=True))


def first_generation(ssm: PublishedConfig) -> dict[str, Any]:
    """Return what `ssm_cfg` says of a Mamba's step sizes."""
    rank = ssm.take("dt_rank", "auto")
    return {
        "dt_rank": rank if rank == "auto" else ssm.whole("dt_rank"),
        "dt_init": ssm.require("dt_init", ["random", "constant"], "random"),
        "dt_scale": ssm.number("dt_scale", 1.0),
        **steps(ssm, "dt_min", "dt_max", "dt_init_floor"),
    }


class StateSpacesMamba(Layout):
    """MambaLMHeadModel of mamba_ssm with Mamba layers."""

    name = "mamba"
    model_type = "mamba"
    generation = "Mamba1"
    keys = (("backbone.embedding.weight", "embedding.weight"), *_SHARED)

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        if "ssm_cfg" not in values or "model_type" in values or "rcps" in values:
            return False
        cfg = values["ssm_cfg"]
        second = isinstance(cfg, Mapping) and cfg.get("layer") == "Mamba2"
        return second == (self.generation == "Mamba2")

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> BackboneConfig:
        ssm = config.section("ssm_cfg")
        shared = self._read_shared(config, ssm)
        shape = self._read_mixer(ssm, shared)
        ssm.require("layer", [self.generation], "Mamba1")
        ssm.ignore("use_fast_path", "use_mem_eff_path", "chunk_size", "sequence_parallel", "process_group")
        ssm.finish()
        config.finish()
        return shape

    def _read_shared(self, config: PublishedConfig, ssm: PublishedConfig) -> dict[str, Any]:
        config.ignore("residual_in_fp32", "fused_add_norm", "initializer_cfg")
        return {
            "d_model": config.whole("d_model"),
            "n_layer": config.whole("n_layer"),
            "vocab_size": config.whole("vocab_size"),
            "pad_vocab_size_multiple": config.whole("pad_vocab_size_multiple", 8),
            "d_intermediate": config.whole("d_intermediate", 0, least=0),
            "rms_norm": config.flag("rms_norm", True),
            "tie_embeddings": config.flag("tie_embeddings", True),
            "d_conv": ssm.whole("d_conv", 4),
            "expand": ssm.whole("expand", 2),
            "bias": ssm.flag("bias", False),
            "conv_bias": ssm.flag("conv_bias", True),
            **self._read_attention(config),
        }

    @staticmethod
    def _read_attention(config: PublishedConfig) -> dict[str, Any]:
        layers, cfg = config.indices("attn_layer_idx", []), config.section("attn_cfg")
        if not layers:
            return {}
        heads = cfg.whole("num_heads")
        width = config.whole("d_model") // heads
        cfg.require("head_dim", [None, width], None)
        cfg.require("rotary_emb_dim", [width], 0)
        cfg.require("d_conv", [0], 0)
        cfg.require("mlp_dim", [0], 0)
        cfg.require("causal", [True])
        cfg.require("softmax_scale", [None], None)
        for key in ("qkv_proj_bias", "out_proj_bias"):
            cfg.require(key, [False], True)
        cfg.require("rotary_emb_interleaved", [False], False)
        kv_heads = cfg.whole_or_none("num_heads_kv")
        base = cfg.number("rotary_emb_base", 10_000.0)
        cfg.finish()
        return {"attn_layer_idx": layers, "n_head": heads, "n_kv_head": kv_heads, "rotary_base": base}

    def _read_mixer(self, ssm: PublishedConfig, shared: dict[str, Any]) -> BackboneConfig:
        return MambaConfig(d_state=ssm.whole("d_state", 16), **first_generation(ssm), **shared)

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        if config.norm_epsilon != 1e-5:
            raise ValueError(f"This layout has norm_epsilon=1e-5; the model has {config.norm_epsilon}.")
        attention: dict[str, Any] = {}
        if config.attn_layer_idx:
            width = config.d_model // config.n_head
            attention = {"causal": True, "num_heads": config.n_head, "rotary_emb_dim": width}
            attention |= {"num_heads_kv": config.n_kv_head, "rotary_emb_base": config.rotary_base}
            attention |= {"qkv_proj_bias": False, "out_proj_bias": False}
        names = ("d_state", "d_conv", "expand", "bias", "conv_bias", "dt_min", "dt_max", "dt_init_floor")
        return {
            "d_model": config.d_model,
            "d_intermediate": config.d_intermediate,
            "n_layer": config.n_layer,
            "vocab_size": config.vocab_size,
            "ssm_cfg": {
                "layer": self.generation,
                **{name: getattr(config, name) for name in (*names, *self._mixer_names())},
                **self._written(config),
            },
            "attn_layer_idx": list(config.attn_layer_idx),
            "attn_cfg": attention,
            "rms_norm": config.rms_norm,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
            "tie_embeddings": config.tie_embeddings,
        }

    def _mixer_names(self) -> tuple[str, ...]:
        return ("dt_rank", "dt_init", "dt_scale")

    def _written(self, config: Any) -> dict[str, Any]:
        return {}


class StateSpacesMamba2(StateSpacesMamba):
    """MambaLMHeadModel of mamba_ssm with Mamba-2 layers."""

    name = "mamba2"
    model_type = "mamba2"
    generation = "Mamba2"

    def _read_mixer(self, ssm: PublishedConfig, shared: dict[str, Any]) -> BackboneConfig:
        ssm.require("conv_init", [None], None)
        ssm.require("activation", ["swish", "silu"], "swish")
        return Mamba2Config(
            d_state=ssm.whole("d_state", 128),
            headdim=ssm.whole("headdim", 64),
            ngroups=ssm.whole("ngroups", 1),
            d_ssm=ssm.whole_or_none("d_ssm"),
            A_init_range=_range(ssm, "A_init_range"),
            D_has_hdim=ssm.flag("D_has_hdim", False),
            rmsnorm=ssm.flag("rmsnorm", True),
            norm_before_gate=ssm.flag("norm_before_gate", False),
            dt_limit=limit(ssm, "dt_limit"),
            **steps(ssm, "dt_min", "dt_max", "dt_init_floor"),
            **shared,
        )

    def _mixer_names(self) -> tuple[str, ...]:
        return ("headdim", "ngroups", "d_ssm", "D_has_hdim", "rmsnorm", "norm_before_gate")

    def _written(self, config: Any) -> dict[str, Any]:
        return {"A_init_range": list(config.A_init_range), "dt_limit": list(config.dt_limit)}


def _range(config: PublishedConfig, key: str) -> tuple[float, float]:
    values = config.take(key, (1.0, 16.0))
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be two numbers in the config of {config.source}; got {values!r}.") from None
    return low, high


class HuggingFaceMamba(Layout):
    """MambaForCausalLM of transformers."""

    name = "mamba-hf"
    model_type = "mamba"
    words: ClassVar[Mapping[str, str]] = {
        **{"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size", "d_conv": "conv_kernel"},
        **{"headdim": "head_dim", "ngroups": "n_groups", "dt_min": "time_step_min", "dt_max": "time_step_max"},
        **{"dt_init_floor": "time_step_floor", "dt_limit": "time_step_limit", "dt_rank": "time_step_rank"},
    }
    keys = (("backbone.embeddings.weight", "embedding.weight"), *_SHARED)

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        return values.get("model_type") == self.model_type

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> BackboneConfig:
        d_model, expand = config.whole("hidden_size"), config.whole("expand", 2)
        config.require("hidden_act", ["silu", "swish"], "silu")
        config.require("intermediate_size", [expand * d_model, None], None)
        config.ignore("residual_in_fp32", "rescale_prenorm_residual", "time_step_init_scheme", "time_step_scale")
        config.ignore("use_mambapy", "use_associative_scan", "use_mamba_kernels", "chunk_size", "d_inner")
        has_head = "lm_head.weight" in tensors
        tied = config.flag("tie_word_embeddings", self.model_type == "mamba")
        shared = {
            "d_model": d_model,
            "n_layer": config.whole("num_hidden_layers"),
            "vocab_size": config.whole("vocab_size"),
            "pad_vocab_size_multiple": 1,
            "d_state": config.whole("state_size"),
            "d_conv": config.whole("conv_kernel", 4),
            "expand": expand,
            "bias": config.flag("use_bias", False),
            "conv_bias": config.flag("use_conv_bias", True),
            "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
            **steps(config, "time_step_min", "time_step_max", "time_step_floor"),
            "tie_embeddings": tied if config.architecture.endswith("CausalLM") else tied or not has_head,
        }
        shape = self._read_mixer(config, shared)
        config.finish()
        return shape

    def _read_mixer(self, config: PublishedConfig, shared: dict[str, Any]) -> BackboneConfig:
        rank = config.take("time_step_rank", "auto")
        return MambaConfig(dt_rank=rank if rank == "auto" else config.whole("time_step_rank"), **shared)

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        if config.d_intermediate or config.attn_layer_idx or not config.rms_norm:
            raise ValueError("This layout has RMS norms, no MLP and no attention; use the layout of mamba_ssm.")
        return {
            "model_type": self.model_type,
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer,
            "vocab_size": config.padded_vocab_size,
            "state_size": config.d_state,
            "conv_kernel": config.d_conv,
            "expand": config.expand,
            "use_bias": config.bias,
            "use_conv_bias": config.conv_bias,
            "layer_norm_epsilon": config.norm_epsilon,
            "time_step_min": config.dt_min,
            "time_step_max": config.dt_max,
            "hidden_act": "silu",
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tie_embeddings,
            **self._written(config),
        }

    def _written(self, config: Any) -> dict[str, Any]:
        return {"time_step_rank": config.shape.rank, "intermediate_size": config.shape.d_inner}


class HuggingFaceMamba2(HuggingFaceMamba):
    """Mamba2ForCausalLM of transformers."""

    name = "mamba2-hf"
    model_type = "mamba2"

    def _read_mixer(self, config: PublishedConfig, shared: dict[str, Any]) -> BackboneConfig:
        heads, width = config.whole("num_heads"), config.whole("head_dim")
        if heads * width != shared["expand"] * shared["d_model"]:
            raise ValueError(
                f"num_heads * head_dim must be expand * hidden_size in the config of {config.source}; got"
                f" {heads} * {width}."
            )
        config.require("norm_before_gate", [True, False], True)
        config.require("rms_norm", [True], True)
        config.ignore("time_step_rank", "A_initializer_range", "initializer_range")
        return Mamba2Config(
            headdim=width,
            ngroups=config.whole("n_groups"),
            dt_limit=limit(config, "time_step_limit"),
            **shared,
        )

    def _written(self, config: Any) -> dict[str, Any]:
        if config.D_has_hdim or config.d_ssm is not None or not config.rmsnorm or config.norm_before_gate:
            raise ValueError("transformers has no D_has_hdim, d_ssm, norm_before_gate, nor a Mamba-2 without its norm.")
        low, high = config.dt_limit
        return {
            "num_heads": config.shape.heads,
            "head_dim": config.headdim,
            "n_groups": config.ngroups,
            "time_step_limit": [low, math.inf if high is None else high],
        }
