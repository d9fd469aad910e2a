"""A pre-norm Transformer with rotary positions: decoder (causal) or encoder (both ways), the field's baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.attention import Attention, Rotary, check_heads
from genossm.nn.block import Block
from genossm.nn.init import init_linear_
from genossm.nn.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BackboneConfig):
    """The shape of a Transformer; the default has the size of the smallest HyenaDNA."""

    model_type: ClassVar[str] = "transformer"

    d_model: int = 128
    n_layer: int = 2
    n_head: int = 4
    """Heads of the queries; they divide `d_model`."""
    n_kv_head: int | None = None
    """Heads of the keys and values, a divisor of `n_head`; None is as many."""
    d_inner: int | None = None
    """Width F of the MLPs; None is 4 D."""
    causal: bool = True
    """Decoder, for the next token; false is an encoder, for masked tokens."""
    bias: bool = True
    """Whether projections and MLPs have biases."""
    rotary_base: float = 10_000.0
    """Of the wavelengths of the rotary positions."""
    rotary_scaling: float = 1.0
    """Positions are divided by it."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    embed_dropout: float = 0.1
    """Dropout of the embeddings."""
    residual_dropout: float = 0.0
    """Dropout of what each mixer and MLP adds."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    tie_embeddings: bool = True
    """Whether the language-model head is the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.d_model, self.n_head, self.n_head if self.n_kv_head is None else self.n_kv_head)
        # It refuses what it can't turn.
        Rotary(self.d_model // self.n_head, self.rotary_base, self.rotary_scaling)

    def build(self) -> "Transformer":
        return Transformer(self)


class Transformer(Backbone):
    """The Transformer backbone."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.config: TransformerConfig = config
        rotary = Rotary(config.d_model // config.n_head, config.rotary_base, config.rotary_scaling)
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(self._block(rotary) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        )
        init_linear_(self, config.n_layer)

    def _block(self, rotary: Rotary) -> Block:
        config = self.config
        mixer = Attention(
            config.d_model,
            config.n_head,
            config.n_kv_head,
            causal=config.causal,
            rotary=rotary,
            qkv_bias=config.bias,
            out_bias=config.bias,
            dropout=config.attention_dropout,
        )
        return Block(
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps),
            mixer,
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps),
            MLP(config.d_model, config.d_inner or 4 * config.d_model, bias=config.bias),
            dropout=config.residual_dropout,
        )

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def streams(self) -> bool:
        return self.causal

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.dropout(super().embed(ids_BL))
