"""The Nucleotide Transformer (Dalla-Torre et al. 2023) and ESM-2 (Lin et al. 2023): one encoder, two generations.

The first has learned positions and GELU networks, the second rotary positions and gated networks without biases; ESM-2
has rotary positions, GELU networks and rescales its embeddings by how much of the input is masked.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.models.base import Backbone, BackboneConfig, length_mask
from genossm.nn.attention import Rotary, attend, check_heads
from genossm.nn.block import Block
from genossm.nn.init import init_linear_

POSITIONS = ("absolute", "rotary")
ACTIVATIONS = ("gelu", "swiglu")
MASKED_IN_TRAINING = 0.15 * 0.8
"""Share of tokens that ESM-2 saw replaced by the mask."""


@dataclass(frozen=True, kw_only=True)
class NucleotideTransformerConfig(BackboneConfig):
    """The shape of a Nucleotide Transformer; the default is a small one of the second generation over single bases."""

    model_type: ClassVar[str] = "nucleotide_transformer"

    d_model: int = 128
    n_layer: int = 4
    n_head: int = 4
    """Heads; they divide `d_model`."""
    d_inner: int = 512
    """Width F of the networks."""
    positions: str = "rotary"
    """`absolute` (learned, first generation) or `rotary`."""
    rotary_base: float = 10_000.0
    """Of the wavelengths of rotary positions."""
    max_positions: int = 1002
    """Rows of the table of learned positions, of which the first `pad_id + 1` stand for no position."""
    activation: str = "swiglu"
    """`gelu` (first generation, ESM-2) or `swiglu`."""
    mlp_bias: bool = False
    """Whether the networks have biases."""
    norm_before: bool = False
    """Normalise the embeddings before the first block."""
    rescale_masked: bool = False
    """Zero the embeddings of masked tokens and rescale the rest by how many there are (ESM-2)."""
    pad_id: int = 4
    """Id of the padding, which has no position."""
    mask_id: int = 3
    """Id of the mask."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    residual_dropout: float = 0.0
    """Dropout of the embeddings and of what each mixer and network adds."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    with_lm_head: bool = True
    """Whether there is a language-model head."""
    tie_embeddings: bool = False
    """Whether the last layer of the head is the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.d_model, self.n_head)
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {self.positions!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}.")
        if self.positions == "absolute" and self.max_positions <= self.pad_id + 1:
            raise ValueError(f"max_positions must be above {self.pad_id + 1}; got {self.max_positions}.")

    def build(self) -> "NucleotideTransformer":
        return NucleotideTransformer(self)


class EncoderAttention(nn.Module):
    """Attention both ways, with the projections of queries, keys and values apart as they were published.

    Args:
        d_model: width D.
        n_head: heads H.
        rotary: turns queries and keys; None leaves the order to the embedding.
        dropout: of the attention weights.
    """

    def __init__(self, d_model: int, n_head: int, rotary: Rotary | None, dropout: float = 0.0):
        super().__init__()
        self.n_head, self.rotary, self.dropout = n_head, rotary, dropout
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Mix along time; keys where `mask_BL` is false are not seen."""
        heads = (self.n_head, -1)
        q_BLHP, k_BLHP, v_BLHP = (f(x_BLD).unflatten(-1, heads) for f in (self.query, self.key, self.value))
        if self.rotary is not None:
            q_BLHP, k_BLHP = self.rotary(q_BLHP, k_BLHP)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(q_BLHP, k_BLHP, v_BLHP, mask_BL, causal=False, dropout=dropout).flatten(2))


class EncoderMLP(nn.Module):
    """D -> F -> D with an exact GELU, or gated: SiLU of the first half of what fc1 gives gates the second half."""

    def __init__(self, d_model: int, d_inner: int, activation: str, bias: bool):
        super().__init__()
        self.gated = activation == "swiglu"
        self.fc1 = nn.Linear(d_model, 2 * d_inner if self.gated else d_inner, bias=bias)
        self.fc2 = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLF = self.fc1(x_BLD)
        if self.gated:
            gate_BLF, h_BLF = h_BLF.chunk(2, dim=-1)
            return self.fc2(F.silu(gate_BLF) * h_BLF)
        return self.fc2(F.gelu(h_BLF))


class MaskedHead(nn.Module):
    """Hidden states to logits: a GELU layer, a norm, and a decoder that may be the embedding."""

    def __init__(self, config: NucleotideTransformerConfig):
        super().__init__()
        width, ids = config.d_model, config.padded_vocab_size
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = None if config.tie_embeddings else nn.Linear(width, ids, bias=False)
        self.bias = nn.Parameter(torch.zeros(ids))

    def forward(self, x_BLD: Tensor, embedding_VD: Tensor) -> Tensor:
        h_BLD = self.layer_norm(F.gelu(self.dense(x_BLD)))
        return F.linear(h_BLD, embedding_VD if self.decoder is None else self.decoder.weight, self.bias)


class NucleotideTransformer(Backbone):
    """The encoder of the Nucleotide Transformer and of ESM-2."""

    def __init__(self, config: NucleotideTransformerConfig):
        super().__init__(config)
        self.config: NucleotideTransformerConfig = config
        rotary = Rotary(config.d_model // config.n_head, config.rotary_base) if config.positions == "rotary" else None
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_positions, config.d_model) if rotary is None else None
        self.norm_before = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps) if config.norm_before else None
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList(self._block(rotary) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = MaskedHead(config) if config.with_lm_head else None
        init_linear_(self, config.n_layer)

    def _block(self, rotary: Rotary | None) -> Block:
        config = self.config
        return Block(
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps),
            EncoderAttention(config.d_model, config.n_head, rotary, config.attention_dropout),
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps),
            EncoderMLP(config.d_model, config.d_inner, config.activation, config.mlp_bias),
            dropout=config.residual_dropout,
        )

    @property
    def causal(self) -> bool:
        return False

    @property
    def max_length(self) -> int | None:
        return None if self.config.positions == "rotary" else self.config.max_positions - self.config.pad_id - 1

    def embed(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return embeddings; `lengths_B` matters to models that rescale by the share of masked tokens."""
        x_BLD = super().embed(ids_BL)
        real_BL = None if lengths_B is None else length_mask(lengths_B, ids_BL.shape[1])
        if self.config.rescale_masked:
            masked_BL = ids_BL == self.config.mask_id
            x_BLD = x_BLD.masked_fill(masked_BL[..., None], 0)
            length_B = ids_BL.shape[1] if lengths_B is None else lengths_B
            share_B = masked_BL.sum(1) / length_B
            x_BLD = x_BLD * ((1 - MASKED_IN_TRAINING) / (1 - share_B))[:, None, None].to(x_BLD.dtype)
        if self.position_embedding is not None:
            counted_BL = ids_BL != self.config.pad_id
            position_BL = counted_BL.cumsum(1) * counted_BL + self.config.pad_id
            x_BLD = x_BLD + self.position_embedding(position_BL)
        if self.norm_before is not None:
            x_BLD = self.norm_before(x_BLD)
        x_BLD = self.dropout(x_BLD)
        return x_BLD if real_BL is None else x_BLD * real_BL[..., None].to(x_BLD.dtype)

    def forward(
        self,
        ids_BL: Integer[Tensor, "B L"],
        lengths_B: Integer[Tensor, " B"] | None = None,
        resets_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        self.check(ids_BL, lengths_B, resets_BL)
        return self.norm_f(self.run_layers(self.embed(ids_BL, lengths_B), lengths_B))

    def logits(self, x_BLD: Tensor) -> Tensor:
        if self.lm_head is None:
            raise ValueError("This model has no language-model head: its file held the encoder alone.")
        return self.lm_head(x_BLD, cast(Tensor, self.embedding.weight))
