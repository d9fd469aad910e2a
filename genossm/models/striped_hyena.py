"""StripedHyena (Poli et al. 2023), on which Evo (Nguyen et al. 2024) is built: modal convolutions and attention.

Blocks of both kinds stand in one stack. A convolution block runs through FFTs over a whole sequence, or token by token
with a state of constant size.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.attention import Attention, Rotary, check_heads
from genossm.nn.block import Block
from genossm.nn.init import init_linear_
from genossm.ops.causal_conv1d import causal_conv1d
from genossm.ops.modal_conv import modal_conv, modal_step

ACTIVATIONS = ("gelu", "silu", "identity")


@dataclass(frozen=True, kw_only=True)
class StripedHyenaConfig(BackboneConfig):
    """The shape of a StripedHyena; the default is a small one over single bases."""

    model_type: ClassVar[str] = "striped_hyena"

    d_model: int = 128
    n_layer: int = 4
    n_head: int = 4
    """Heads of the attention blocks, and of the layout of the convolution blocks; they divide `d_model`."""
    n_kv_head: int | None = None
    """Heads of the keys and values; None is as many."""
    attn_layer_idx: tuple[int, ...] = (1,)
    """Which blocks are attention, counted from 0; the others are convolutions."""
    d_state: int = 8
    """Modes M of each filter."""
    d_inner: int | None = None
    """Width F of the gated networks; None is 8/3 D, rounded up to a multiple of 16."""
    short_filter_order: int = 3
    """Taps of the short convolution."""
    short_filter_bias: bool = True
    """Whether the short convolution has a bias."""
    activation: str = "gelu"
    """Of the gated networks: `gelu` (exact), `silu` or `identity`."""
    qkv_bias: bool = True
    """Whether the projections into the mixers have biases."""
    out_bias: bool = True
    """Whether the projection out of attention has a bias; that of a convolution always has one."""
    column_split: bool = True
    """Whether the projections of a convolution stand together head by head, as published, or gate by gate."""
    norm_eps: float = 1e-6
    """Added to the root mean square, outside the root."""
    final_norm: bool = True
    """Whether the last block is followed by a norm."""
    rotary_base: float = 10_000.0
    """Of the wavelengths of the rotary positions."""
    rotary_scaling: float = 1.0
    """Positions are divided by it."""
    embed_dropout: float = 0.0
    """Dropout of the embeddings."""
    residual_dropout: float = 0.0
    """Dropout of what each mixer and network adds."""
    tie_embeddings: bool = True
    """Whether the language-model head is the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.d_model, self.n_head, self.n_kv_head)
        outside = [i for i in self.attn_layer_idx if not 0 <= i < self.n_layer]
        if outside:
            raise ValueError(f"attn_layer_idx must be in 0..{self.n_layer - 1}; got {outside[0]}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}.")
        if self.d_state < 1 or self.short_filter_order < 1:
            raise ValueError(
                f"d_state and short_filter_order must be at least 1; got {self.d_state}, {self.short_filter_order}."
            )

    @property
    def mlp_width(self) -> int:
        """Width F of the gated networks."""
        return self.d_inner or -(-int(8 * self.d_model / 3) // 16) * 16

    def build(self) -> "StripedHyena":
        return StripedHyena(self)


class RootMeanSquareNorm(nn.Module):
    """x / (rms(x) + eps) * scale: unlike RMSNorm, eps stands outside the root."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD, dtype = x_BLD.float(), x_BLD.dtype
        rms_BL1 = x_BLD.norm(dim=-1, keepdim=True) * x_BLD.shape[-1] ** -0.5
        return self.weight * (x_BLD / (rms_BL1 + self.eps)).to(dtype)


class GatedMLP(nn.Module):
    """fc2(act(fc1(x)) * up(x)), without biases: D -> F -> D."""

    def __init__(self, d_model: int, d_inner: int, activation: str):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_inner, bias=False)
        self.up = nn.Linear(d_model, d_inner, bias=False)
        self.fc2 = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.fc1(x_BLD)
        if self.activation != "identity":
            h_BLF = F.gelu(h_BLF) if self.activation == "gelu" else F.silu(h_BLF)
        return self.fc2(h_BLF * self.up(x_BLD))


class ModalHyena(nn.Module):
    """Order-2 Hyena with modal filters: projections, a short convolution, gate, modal convolution, gate, projection."""

    NO_WEIGHT_DECAY = ("poles_DM2", "residues_DM2", "skip_D")

    def __init__(self, config: StripedHyenaConfig):
        super().__init__()
        width, modes = config.d_model, config.d_state
        self.d_model, self.n_head, self.column_split = width, config.n_head, config.column_split
        self.in_proj = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.short_filter = nn.Conv1d(
            3 * width, 3 * width, config.short_filter_order, groups=3 * width, bias=config.short_filter_bias
        )
        # Time constants from one token to a thousand, phases over the half circle, gains that sum to about one.
        modulus_DM = torch.exp(-torch.exp(-torch.rand(width, modes) * math.log(1000.0)))
        phase_DM = torch.rand(width, modes) * math.pi
        self.poles_DM2 = nn.Parameter(torch.view_as_real(torch.polar(modulus_DM, phase_DM)).contiguous())
        self.residues_DM2 = nn.Parameter(torch.randn(width, modes, 2) / modes)
        self.skip_D = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, width)

    def filters(self) -> tuple[Tensor, Tensor]:
        """Return poles p_DM and residues r_DM as complex numbers, float32 whatever the rest of the model is."""
        return torch.view_as_complex(self.poles_DM2.float()), torch.view_as_complex(self.residues_DM2.float())

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Mix along time; positions where `mask_BL` is false are taken for zeros after the projections."""
        z_BLE = self.in_proj(x_BLD)
        if mask_BL is not None:
            z_BLE = z_BLE * mask_BL[..., None].to(z_BLE.dtype)
        gate_BLD, u_BLD = self._gates(causal_conv1d(z_BLE, self.short_filter.weight[:, 0], self.short_filter.bias))
        with torch.autocast(x_BLD.device.type, enabled=False):
            y_BLD = modal_conv(u_BLD, *self.filters(), self.skip_D)
        return self.out_proj(y_BLD * gate_BLD)

    def _gates(self, z_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outer gate, and the value under the inner gate."""
        if self.column_split:
            # (heads, [outer gate | inner gate | value], width of a head)
            parts = z_BLE.unflatten(-1, (self.n_head, 3, -1)).unbind(-2)
            outer_BLD, inner_BLD, v_BLD = (part_BLHP.flatten(2) for part_BLHP in parts)
        else:
            outer_BLD, inner_BLD, v_BLD = z_BLE.chunk(3, dim=-1)
        return outer_BLD, inner_BLD * v_BLD

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the state before the first position: inputs of the short convolution and the modes of the long one."""
        weight = self.short_filter.weight
        shape = (batch_size, weight.shape[0], weight.shape[-1] - 1)
        modes = torch.zeros(batch_size, *self.poles_DM2.shape[:2], dtype=torch.complex64, device=weight.device)
        return {"conv_BEW1": weight.new_zeros(shape), "modes_BDM": modes}

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix positions that follow those that made `state`; one alone runs as a recurrence, more through FFTs."""
        z_BLE, conv_BEW1 = causal_conv1d(
            self.in_proj(x_BLD),
            self.short_filter.weight[:, 0],
            self.short_filter.bias,
            initial_state_BEW1=state["conv_BEW1"],
            return_state=True,
        )
        gate_BLD, u_BLD = self._gates(z_BLE)
        p_DM, r_DM = self.filters()
        with torch.autocast(x_BLD.device.type, enabled=False):
            if u_BLD.shape[1] == 1:
                y_BD, modes_BDM = modal_step(u_BLD[:, 0], state["modes_BDM"], p_DM, r_DM, self.skip_D)
                y_BLD = y_BD[:, None]
            else:
                y_BLD, modes_BDM = modal_conv(u_BLD, p_DM, r_DM, self.skip_D, state["modes_BDM"], return_state=True)
        return self.out_proj(y_BLD * gate_BLD), {"conv_BEW1": conv_BEW1, "modes_BDM": modes_BDM}


class StripedHyena(Backbone):
    """The StripedHyena backbone."""

    def __init__(self, config: StripedHyenaConfig):
        super().__init__(config)
        self.config: StripedHyenaConfig = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(self._block(i in config.attn_layer_idx) for i in range(config.n_layer))
        self.norm_f = RootMeanSquareNorm(config.d_model, config.norm_eps) if config.final_norm else nn.Identity()
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        )
        init_linear_(self, config.n_layer)

    def _block(self, attends: bool) -> Block:
        config = self.config
        mixer: nn.Module
        if attends:
            rotary = Rotary(config.d_model // config.n_head, config.rotary_base, config.rotary_scaling)
            mixer = Attention(
                config.d_model,
                config.n_head,
                config.n_kv_head,
                causal=True,
                rotary=rotary,
                qkv_bias=config.qkv_bias,
                out_bias=config.out_bias,
            )
        else:
            mixer = ModalHyena(config)
        return Block(
            RootMeanSquareNorm(config.d_model, config.norm_eps),
            mixer,
            RootMeanSquareNorm(config.d_model, config.norm_eps),
            GatedMLP(config.d_model, config.mlp_width, config.activation),
            dropout=config.residual_dropout,
        )

    @property
    def causal(self) -> bool:
        return True

    @property
    def streams(self) -> bool:
        return True

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.dropout(super().embed(ids_BL))
