"""Mamba and Mamba-2 language models (Gu & Dao 2023; Dao & Gu 2024), and hybrids with attention at some layers."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.attention import Attention, Rotary, attend_documents, check_heads
from genossm.nn.block import Block
from genossm.nn.mamba import GatedMLP, Mamba, Mamba2, Mamba2Shape, MambaShape, StepInit, init_mamba_

_PIECE = 1024
"""Positions that inference on a CPU runs through all layers at a time: activations stay in cache (measured)."""


@dataclass(frozen=True, kw_only=True)
class _SharedConfig(BackboneConfig):
    """What the configs of both generations have, in the words of the published config.json."""

    d_conv: int = 4
    """Taps W of the short convolution."""
    expand: int = 2
    """Inner width over d_model."""
    d_intermediate: int = 0
    """Width F of a gated MLP after each mixer, rounded up to a multiple of 128; 0 is none, as published."""
    rms_norm: bool = True
    """RMS norms; else LayerNorms."""
    norm_epsilon: float = 1e-5
    """Epsilon of every norm."""
    bias: bool = False
    """Whether the projections in and out of a mixer have biases."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    dt_min: float = 1e-3
    """Smallest step size that a fresh layer draws; see `StepInit`."""
    dt_max: float = 0.1
    """Largest step size that a fresh layer draws."""
    dt_init_floor: float = 1e-4
    """Floor of the drawn step sizes."""
    attn_layer_idx: Sequence[int] = ()
    """Layers, from 0, that mix by attention instead: a hybrid."""
    n_head: int = 8
    """Heads of those layers."""
    n_kv_head: int | None = None
    """Heads of their keys and values; None is n_head."""
    rotary_base: float = 10_000.0
    """Base of their rotary wavelengths."""
    tie_embeddings: bool = True
    """Whether the language-model head is the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 <= index < self.n_layer for index in self.attn_layer_idx):
            raise ValueError(
                f"attn_layer_idx must name layers in 0..{self.n_layer - 1}; got {list(self.attn_layer_idx)}."
            )
        if self.attn_layer_idx:
            check_heads(self.d_model, self.n_head, self.n_kv_head)
        if self.d_intermediate < 0:
            raise ValueError(f"d_intermediate must not be negative; got {self.d_intermediate}.")
        # The mixer's own shape refuses what it can't be.
        self.shape  # noqa: B018

    @property
    def steps(self) -> StepInit:
        """How step sizes are drawn."""
        return StepInit(dt_min=self.dt_min, dt_max=self.dt_max, dt_init_floor=self.dt_init_floor)

    @property
    @abstractmethod
    def shape(self) -> MambaShape | Mamba2Shape:
        """The shape of a mixer."""

    def build(self) -> "MambaLM":
        return MambaLM(self)


@dataclass(frozen=True, kw_only=True)
class MambaConfig(_SharedConfig):
    """The shape of a Mamba; defaults are those of the published code."""

    model_type: ClassVar[str] = "mamba"

    d_model: int = 128
    n_layer: int = 4
    d_state: int = 16
    """States N of a channel."""
    dt_rank: int | str = "auto"
    """Width R of the step sizes' bottleneck; "auto" is d_model / 16, rounded up."""
    dt_init: str = "random"
    """How the step sizes' projection is drawn: "random" or "constant"."""
    dt_scale: float = 1.0
    """Scale of that draw."""

    @property
    def shape(self) -> MambaShape:
        return MambaShape(
            d_model=self.d_model,
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            dt_rank=self.dt_rank,
            dt_init=self.dt_init,
            dt_scale=self.dt_scale,
            bias=self.bias,
            conv_bias=self.conv_bias,
            steps=self.steps,
        )


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(_SharedConfig):
    """The shape of a Mamba-2; defaults are those of the published code."""

    model_type: ClassVar[str] = "mamba2"

    d_model: int = 128
    n_layer: int = 4
    d_state: int = 128
    """States N of a channel."""
    headdim: int = 64
    """Width P of a head."""
    ngroups: int = 1
    """Groups G of heads that share B and C."""
    d_ssm: int | None = None
    """Width that is scanned; the rest of the inner width is a gated MLP. None is all of it."""
    A_init_range: Sequence[float] = (1.0, 16.0)
    """Range of the decay rates of a fresh layer."""
    D_has_hdim: bool = False
    """Whether the skip has a weight a channel instead of one a head."""
    rmsnorm: bool = True
    """Whether the gated result is normalised, each group by itself."""
    norm_before_gate: bool = False
    """Whether that norm comes before the gate."""
    dt_limit: Sequence[float | None] = (0.0, None)
    """Smallest and largest step size; None is no limit."""

    @property
    def shape(self) -> Mamba2Shape:
        return Mamba2Shape(
            d_model=self.d_model,
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            headdim=self.headdim,
            ngroups=self.ngroups,
            d_ssm=self.d_ssm,
            A_init_range=self.A_init_range,
            D_has_hdim=self.D_has_hdim,
            rmsnorm=self.rmsnorm,
            norm_before_gate=self.norm_before_gate,
            dt_limit=self.dt_limit,
            bias=self.bias,
            conv_bias=self.conv_bias,
            steps=self.steps,
        )


class CausalAttention(Attention):
    """Attention among Mamba layers: padding stands on the right, where a causal layer doesn't look."""

    def forward(self, x_BLD: Tensor, lengths_B: Tensor | None = None, resets_BL: Tensor | None = None) -> Tensor:
        """Mix along time, each document by itself; lengths change nothing."""
        if resets_BL is None:
            return super().forward(x_BLD)
        return self.out_proj(attend_documents(*self._project(x_BLD), resets_BL, self.dropout).flatten(2))


class MambaLM(Backbone):
    """The backbone of both generations: pre-norm blocks of one mixer each, from left to right."""

    def __init__(self, config: MambaConfig | Mamba2Config | _SharedConfig):
        super().__init__(config)
        self.config: MambaConfig | Mamba2Config | _SharedConfig = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(self._block(index) for index in range(config.n_layer))
        self.norm_f = build_norm(config.d_model, config.rms_norm, config.norm_epsilon)
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        )
        init_mamba_(self, config.n_layer, residuals_per_layer=2 if config.d_intermediate else 1)

    def _block(self, index: int) -> Block:
        config = self.config
        norm1 = build_norm(config.d_model, config.rms_norm, config.norm_epsilon)
        mlp = GatedMLP(config.d_model, config.d_intermediate) if config.d_intermediate else None
        norm2 = build_norm(config.d_model, config.rms_norm, config.norm_epsilon) if mlp is not None else None
        return Block(norm1, self._mixer(index), norm2, mlp)

    def _mixer(self, index: int) -> nn.Module:
        config, shape = self.config, self.config.shape
        if index in config.attn_layer_idx:
            rotary = Rotary(config.d_model // config.n_head, config.rotary_base)
            return CausalAttention(
                config.d_model, config.n_head, config.n_kv_head, rotary=rotary, qkv_bias=False, out_bias=False
            )
        return Mamba(shape) if isinstance(shape, MambaShape) else Mamba2(shape, config.norm_epsilon)

    @property
    def causal(self) -> bool:
        return True

    @property
    def streams(self) -> bool:
        return True

    @property
    def packs(self) -> bool:
        return True

    def context(self, length: int, lengths_B: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor | None, ...]:
        # Padding stands on the right, where no causal layer looks.
        return (None, resets_BL)

    def forward(
        self,
        ids_BL: Integer[Tensor, "B L"],
        lengths_B: Integer[Tensor, " B"] | None = None,
        resets_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        cheap = ids_BL.device.type == "cpu" and not torch.is_grad_enabled() and not self.config.attn_layer_idx
        if not cheap or resets_BL is not None or ids_BL.ndim != 2 or ids_BL.shape[1] <= _PIECE:
            return super().forward(ids_BL, lengths_B, resets_BL)
        self.check(ids_BL, lengths_B)
        x_BLD = self.norm_f.get_parameter("weight").new_empty(*ids_BL.shape, self.config.d_model)
        start = 0
        for piece_BLD in self.stream(ids_BL):
            x_BLD[:, start : start + piece_BLD.shape[1]] = piece_BLD
            start += piece_BLD.shape[1]
        return x_BLD

    def stream(self, ids_BL: Tensor, piece: int = _PIECE) -> Iterator[Tensor]:
        """Yield the hidden states of successive pieces of a sequence of any length, in constant memory.

        Args:
            ids_BL: ids, e.g. of a whole contig.
            piece: positions run at a time; the state is carried over exactly.
        """
        state = self.init_state(ids_BL.shape[0])
        for piece_BL in ids_BL.split(piece, dim=1):
            x_BLD, state = self.extend(piece_BL, state)
            yield x_BLD


def build_norm(width: int, rms_norm: bool, eps: float) -> nn.Module:
    """Return the norm that a config asks for."""
    return nn.RMSNorm(width, eps=eps) if rms_norm else nn.LayerNorm(width, eps=eps)
