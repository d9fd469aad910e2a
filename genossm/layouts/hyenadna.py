"""Published HyenaDNA: the HuggingFace repositories and the checkpoints of the training code."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from genossm.layouts.base import Layout, PublishedConfig, check_export, label_keys, labelled
from genossm.models.base import Backbone, BackboneConfig
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.nn.head import HeadConfig
from genossm.nn.hyena import decays

logger = logging.getLogger(__name__)

POOLINGS = {"pool": "mean", "last": "last", "first": "first", "sum": "sum", "ragged": "none"}
"""Modes of the published head, and what we call them; "ragged" answers every position."""
_PREFIX, _SPREAD = 1024, 33
"""Positions from the start, and spread over the rest, at which a long table is compared with its formula."""
_ULPS = 2e-6
"""How far a formula may be from a stored tensor that was computed by another version of torch."""


class _HyenaDNALayout(Layout):
    """What the two published layouts share."""

    model_type = "hyenadna"
    words: ClassVar[Mapping[str, str]] = {"max_length": "max_seq_len", "frequency": "activation_freq"}
    keys = (
        ("backbone.embeddings.word_embeddings.weight", "embedding.weight"),
        ("backbone.layers.{i}.norm1.{p}", "layers.{i}.norm1.{p}"),
        ("backbone.layers.{i}.mixer.in_proj.{p}", "layers.{i}.mixer.in_proj.{p}"),
        ("backbone.layers.{i}.mixer.short_filter.{p}", "layers.{i}.mixer.short_filter.{p}"),
        ("backbone.layers.{i}.mixer.filter_fn.bias", "layers.{i}.mixer.filter_fn.bias"),
        (
            "backbone.layers.{i}.mixer.filter_fn.implicit_filter.{j}.{p}",
            "layers.{i}.mixer.filter_fn.implicit_filter.{j}.{p}",
        ),
        (
            "backbone.layers.{i}.mixer.filter_fn.implicit_filter.{j}.freq",
            "layers.{i}.mixer.filter_fn.implicit_filter.{j}.freq",
        ),
        ("backbone.layers.{i}.mixer.filter_fn.pos_emb.z", "layers.{i}.mixer.filter_fn.z_LE?"),
        ("backbone.layers.{i}.mixer.filter_fn.pos_emb.t", "layers.{i}.mixer.filter_fn.t_L?"),
        ("backbone.layers.{i}.mixer.filter_fn.modulation.deltas", "layers.{i}.mixer.filter_fn.deltas_C?"),
        ("backbone.layers.{i}.mixer.out_proj.{p}", "layers.{i}.mixer.out_proj.{p}"),
        ("backbone.layers.{i}.norm2.{p}", "layers.{i}.norm2.{p}"),
        ("backbone.layers.{i}.mlp.fc1.{p}", "layers.{i}.mlp.fc1.{p}"),
        ("backbone.layers.{i}.mlp.fc2.{p}", "layers.{i}.mlp.fc2.{p}"),
        ("backbone.ln_f.{p}", "norm_f.{p}"),
        ("lm_head.weight", "lm_head.weight"),
    )

    def fit(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith("pos_emb.t") and tensor.ndim == 3:
            return tensor[0, :, 0]
        if name.endswith("pos_emb.z") and tensor.ndim == 3:
            return tensor[0]
        return tensor.flatten() if name.endswith("modulation.deltas") else tensor

    def unfit(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith("pos_emb.t"):
            return tensor[None, :, None]
        if name.endswith("pos_emb.z"):
            return tensor[None]
        return tensor[None, None] if name.endswith("modulation.deltas") else tensor

    def required(self, config: BackboneConfig, architecture: str) -> list[str]:
        return self.regenerable(config)

    def misfit(self, name: str, tensor: Tensor, backbone: Backbone) -> str | None:
        # Values were compared by `held`, without computing long tables.
        config = backbone.config
        channels = config.d_model * (config.order - 1)
        shapes = {
            "z": (1, config.max_length, config.emb_dim),
            "t": (1, config.max_length, 1),
            "deltas": (1, 1, channels),
        }
        shape = shapes[name.rpartition(".")[2]]
        if tensor.shape != shape:
            return f"has shape {tuple(tensor.shape)} instead of {shape}"
        return None if tensor.is_floating_point() else f"has type {tensor.dtype} instead of a floating one"

    def regenerable(self, config: BackboneConfig) -> list[str]:
        kinds = ("pos_emb.z", "pos_emb.t", "modulation.deltas")
        return [f"backbone.layers.{i}.mixer.filter_fn.{kind}" for i in range(config.n_layer) for kind in kinds]

    def held(self, tensors: Mapping[str, Tensor], max_length: int, emb_dim: int) -> dict[str, bool]:
        """Return which regenerable tensors of a file differ from their formulas and must be held.

        Positions are compared one by one at the start and here and there behind it, since looking at each of a million
        would take longer than the rest of loading: training changes a prefix of z, as far as its inputs reached.
        """
        seen_P = torch.unique(torch.cat([torch.arange(min(max_length, _PREFIX)), self._spread(max_length)]))
        z_PE, t_P = self.positions(max_length, emb_dim, seen_P)
        own = {"own_positions": False, "own_decay": False}
        for name, tensor in tensors.items():
            kind = name.rpartition(".")[2]
            # A tensor of another shape or type is refused later.
            if kind == "z" and tensor.shape == (1, max_length, emb_dim) and tensor.is_floating_point():
                own["own_positions"] |= not torch.allclose(tensor[0, seen_P].float(), z_PE, atol=_ULPS, rtol=0)
            elif kind == "t" and tensor.shape == (1, max_length, 1) and tensor.is_floating_point():
                own["own_positions"] |= not torch.allclose(tensor[0, seen_P, 0].float(), t_P, atol=_ULPS, rtol=0)
            elif kind == "deltas" and tensor.numel():
                formula = decays(tensor.numel())
                own["own_decay"] |= not torch.allclose(tensor.flatten().float(), formula, atol=10 * _ULPS, rtol=0)
        return own

    @staticmethod
    def _spread(max_length: int) -> Tensor:
        return torch.linspace(0, max_length - 1, _SPREAD, dtype=torch.float64).long()

    def positions(self, length: int, emb_dim: int, index_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z_PE and t_P at some positions, or at all as the published code of this layout rounds them."""
        bands = (emb_dim - 1) // 2
        if index_P is None:
            t_P, step_P = torch.linspace(0, 1, length), torch.linspace(0, length - 1, length)
        else:
            t_P, step_P = (index_P.double() / max(length - 1, 1)).float(), index_P.float()
        angle_P1 = 2 * math.pi * step_P[:, None] / length
        real_PK, imaginary_PK = self.phases(angle_P1, torch.linspace(1e-4, bands - 1, bands))
        return torch.cat([t_P[:, None], real_PK, imaginary_PK], dim=-1), t_P

    def phases(self, angle_P1: Tensor, band_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the real and imaginary parts of exp(-i band angle)."""
        return torch.cos(-band_K * angle_P1), torch.sin(-band_K * angle_P1)

    def constant(self, name: str, config: BackboneConfig) -> Tensor | None:
        assert isinstance(config, HyenaDNAConfig)
        if name.endswith(".freq") and not config.train_freq:
            return torch.full((1, config.filter_order), config.frequency)
        return None

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        config = backbone.config
        kind = name.rpartition(".")[2]
        if kind == "deltas":
            return decays(config.d_model * (config.order - 1))[None, None]
        if kind == "t":
            return torch.linspace(0, 1, config.max_length)[None, :, None]
        return self.positions(config.max_length, config.emb_dim)[0][None] if kind == "z" else None


class HyenaDNAHuggingFace(_HyenaDNALayout):
    """The `-hf` repositories: HyenaDNAForCausalLM, HyenaDNAForSequenceClassification, HyenaDNAModel."""

    name = "hyenadna-hf"
    prefixes = ("hyena.",)
    keys = (*_HyenaDNALayout.keys, ("score.weight", "head.out.weight"))

    def full(self, name: str, head: HeadConfig | None) -> str:
        return f"hyena.{name}" if name.startswith("backbone.") else name

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        return values.get("model_type") == "hyenadna" and "layer" not in values

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HyenaDNAConfig:
        d_model, max_length = config.whole("d_model"), config.whole("max_seq_len")
        emb_dim = config.whole("emb_dim")
        config.require("hyena_order", [2], 2)
        # The published code pads by 2 whatever the number of taps: any other number would look ahead or be shifted.
        config.require("short_filter_order", [3], 3)
        config.ignore("use_bias", "hyena_filter_dropout")
        tied = config.flag("tie_word_embeddings", False)
        has_head = "lm_head.weight" in tensors
        config.check_head("SequenceClassification", "score.weight", tensors)
        shape = HyenaDNAConfig(
            d_model=d_model,
            n_layer=config.whole("n_layer"),
            vocab_size=config.whole("vocab_size"),
            pad_vocab_size_multiple=config.whole("pad_vocab_size_multiple", 8),
            tokenizer="hyenadna",
            d_inner=config.whole_or_none("d_inner"),
            max_length=max_length,
            emb_dim=emb_dim,
            filter_order=config.whole("filter_order"),
            num_inner_mlps=config.whole("num_inner_mlps", least=0),
            frequency=config.number("activation_freq", least=-math.inf),
            train_freq=config.flag("train_freq", True),
            final_norm_eps=config.number("layer_norm_epsilon", 1e-5),
            embed_dropout=config.number("embed_dropout", 0.0),
            hyena_dropout=config.number("hyena_dropout", 0.0),
            tie_embeddings=tied if config.architecture.endswith("CausalLM") else tied or not has_head,
            **self.held(tensors, max_length, emb_dim),
        )
        config.finish()
        return shape

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        if "score.weight" not in tensors:
            return None
        pad_id = None if config.values.get("pad_token_id") is None else config.whole("pad_token_id", least=0)
        return HeadConfig(**labelled(config.labels), pooling="last", bias=False, pad_id=pad_id)

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        _check_exportable(config)
        if config.layer_norm_eps != 1e-5 or config.shift != 0.05 or not config.modulate:
            raise ValueError(
                "This layout has layer_norm_eps=1e-5 in its blocks, and windows with shift=0.05 over filters; the model"
                f" has layer_norm_eps={config.layer_norm_eps}, modulate={config.modulate}, shift={config.shift}."
            )
        labels = label_keys(head)
        if head is not None:
            check_export(head, ["last"], bias=False)
        return {
            "model_type": "hyenadna",
            "architectures": ["HyenaDNAForCausalLM" if head is None else "HyenaDNAForSequenceClassification"],
            "d_model": config.d_model,
            "n_layer": config.n_layer,
            "vocab_size": config.vocab_size,
            "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
            "d_inner": config.d_inner or 4 * config.d_model,
            "max_seq_len": config.max_length,
            "emb_dim": config.emb_dim,
            "filter_order": config.filter_order,
            "num_inner_mlps": config.num_inner_mlps,
            "hyena_order": 2,
            "short_filter_order": 3,
            "activation_freq": config.frequency,
            "train_freq": config.train_freq,
            "use_bias": True,
            "layer_norm_epsilon": config.final_norm_eps or config.layer_norm_eps,
            "embed_dropout": config.embed_dropout,
            "hyena_dropout": config.hyena_dropout,
            "hyena_filter_dropout": 0.0,
            "initializer_range": 0.02,
            "pad_token_id": 4,
            "tie_word_embeddings": config.tie_embeddings,
            **labels,
        }


class HyenaDNAOriginal(_HyenaDNALayout):
    """The `weights.ckpt` files of the training code, with or without `.layer` in the names of recomputed modules."""

    name = "hyenadna"
    words: ClassVar[Mapping[str, str]] = {
        **{"max_length": "l_max", "frequency": "w"},
        **{"residual_dropout": "resid_dropout", "hyena_dropout": "dropout"},
    }
    prefixes = ("model.",)
    keys = (
        *_HyenaDNALayout.keys,
        ("head.output_transform.{p}", "head.out.{p}"),
        ("decoder.0.output_transform.{p}", "head.out.{p}"),
    )

    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        return "layer" in values and "n_layer" in values and "model_type" not in values

    def full(self, name: str, head: HeadConfig | None) -> str:
        return name if name.startswith("head.") else f"model.{name}"

    def bare(self, name: str) -> str:
        # Modules whose activations are recomputed in the backward pass sit inside a wrapper called `layer`.
        return re.sub(r"\.(mixer|mlp)\.layer\.", r".\1.", super().bare(name))

    def phases(self, angle_P1: Tensor, band_K: Tensor) -> tuple[Tensor, Tensor]:
        phase_PK = torch.exp(-1j * band_K * angle_P1)
        return phase_PK.real, phase_PK.imag

    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HyenaDNAConfig:
        layer = config.section("layer")
        layer.require("_name_", ["hyena"], "hyena")
        d_model, max_length = config.whole("d_model"), layer.whole("l_max")
        emb_dim = layer.whole("emb_dim", 3)
        for key in ("num_heads", "inner_factor", "num_blocks"):
            layer.require(key, [1], 1)
        for key in ("normalized", "bidirectional", "outer_mixing", "post_order_ffn", "linear_mixer"):
            layer.require(key, [False], False)
        layer.require("activation", ["id", "identity", "linear", None], "id")
        own = self.held(tensors, max_length, emb_dim)
        # Positions that are trained are parameters, and stay so here.
        own["own_positions"] |= layer.number("lr_pos_emb", 1e-5) > 0
        # These set learning rates, kernels and what the file holds as tensors; standalone code has 3 taps whatever
        # the config says.
        layer.ignore("lr", "wd", "modulation_lr", "local_order", "short_filter_order", "target")
        layer.ignore(
            "fast_decay_pct", "slow_decay_pct", "filter_dropout", "fused_bias_fc", "fused_fft_conv", "jit_filter"
        )
        layer.ignore("return_state", "use_bias", "bias", "causal", "device", "dtype", "layer_idx", "filter_cls")
        config.require("max_position_embeddings", [0, None], 0)
        config.require("attn_layer_idx", [None, []], None)
        config.require("identity_mlp", [False], False)
        config.ignore("_name_", "attn_cfg", "checkpoint_mixer", "checkpoint_mlp", "fused_dropout_add_ln", "fused_mlp")
        config.ignore("fused_bias_fc", "residual_in_fp32", "return_hidden_state", "initializer_cfg", "process_group")
        config.ignore("sequence_parallel", "device", "dtype", "n_classes", "return_residual", "norm", "decoder")
        headed = any(".output_transform." in name for name in tensors)
        if config.flag("use_head", headed) and not headed:
            raise ValueError(f"use_head is true in the config of {config.source}, whose weights have no head.")
        shape = HyenaDNAConfig(
            d_model=d_model,
            n_layer=config.whole("n_layer"),
            vocab_size=config.whole("vocab_size"),
            pad_vocab_size_multiple=config.whole("pad_vocab_size_multiple", 1),
            tokenizer="hyenadna",
            d_inner=config.whole_or_none("d_inner"),
            max_length=max_length,
            order=self._order(layer),
            emb_dim=emb_dim,
            filter_order=layer.whole("filter_order", 64),
            num_inner_mlps=layer.whole("num_inner_mlps", 2, least=0),
            frequency=layer.number("w", 1, least=-math.inf),
            train_freq=layer.flag("train_freq", True),
            modulate=layer.flag("modulate", True),
            shift=layer.number("shift", 0.05, least=-math.inf),
            layer_norm_eps=config.number("layer_norm_epsilon", 1e-5),
            embed_dropout=config.number("embed_dropout", 0.1),
            residual_dropout=config.number("resid_dropout", 0.0),
            hyena_dropout=layer.number("dropout", 0.0),
            tie_embeddings=True,
            **own,
        )
        layer.finish()
        config.finish()
        return shape

    @staticmethod
    def _order(layer: PublishedConfig) -> int:
        order = layer.whole("order", 2, least=2)
        if order > 2:
            logger.warning(
                "%s has order=%d: the filters' channels are read as the published inference code orders them (o d); the"
                " training code of the same authors has (d o).",
                layer.source,
                order,
            )
        return order

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        decoder = config.section("decoder")
        decoder.require("_name_", ["sequence"], "sequence")
        mode = decoder.require("mode", [*POOLINGS], "pool")
        ragged = mode == "ragged"
        # Rows with lengths are always cut to their real positions here, and rows without are whole.
        decoder.require("use_lengths", [False] if ragged else [False, True], False)
        positions = decoder.whole_or_none("l_output", least=int(ragged)) if "l_output" in decoder.values else 0
        decoder.finish()
        for name, tensor in tensors.items():
            if ".output_transform." in name and tensor.ndim:
                shape = {"n_outputs": tensor.shape[0], "pooling": POOLINGS[mode]}
                return HeadConfig(**shape, positions=0 if ragged else positions)
        return None

    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        config = backbone.config
        _check_exportable(config, any_order=True)
        if not config.tie_embeddings:
            raise ValueError("This layout ties the language-model head to the embedding; the model has its own.")
        return {
            "d_model": config.d_model,
            "n_layer": config.n_layer,
            "d_inner": config.d_inner or 4 * config.d_model,
            "vocab_size": config.vocab_size,
            "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
            "embed_dropout": config.embed_dropout,
            "resid_dropout": config.residual_dropout,
            "residual_in_fp32": True,
            "checkpoint_mixer": False,
            "checkpoint_mlp": False,
            **({} if head is None else {"decoder": _decoder_of(head)}),
            "layer": {
                "_name_": "hyena",
                "l_max": config.max_length,
                "order": config.order,
                "lr_pos_emb": 1e-5 if config.own_positions else 0.0,
                "emb_dim": config.emb_dim,
                "filter_order": config.filter_order,
                "num_inner_mlps": config.num_inner_mlps,
                "w": config.frequency,
                "train_freq": config.train_freq,
                "shift": config.shift,
                "modulate": config.modulate,
            },
        }


def _check_exportable(config: HyenaDNAConfig, any_order: bool = False) -> None:
    if (config.order != 2 and not any_order) or config.bidirectional or config.short_filter_order != 3:
        raise ValueError(
            "The published HyenaDNA code has 3 taps and looks one way, that of HuggingFace has order 2; this model has"
            f" order={config.order}, short_filter_order={config.short_filter_order},"
            f" bidirectional={config.bidirectional}."
        )


def _decoder_of(head: HeadConfig) -> dict[str, Any]:
    """Return what the fine-tuning code calls a head.

    Raises:
        ValueError: its head can't do that.
    """
    check_export(head, POOLINGS.values(), positions=head.positions, bias=True)
    mode = {pooling: mode for mode, pooling in POOLINGS.items()}[head.pooling]
    positions = None if mode == "ragged" else head.positions
    return {"_name_": "sequence", "mode": mode, "l_output": positions, "use_lengths": False}
