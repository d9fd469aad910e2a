"""A pre-norm Transformer with rotary positions: decoder (causal) or encoder (both ways), the field's baseline."""

from dataclasses import dataclass
from typing import ClassVar

from genossm.models.prenorm import PreNorm, PreNormConfig
from genossm.nn.attention import Attention, Rotary, check_heads


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(PreNormConfig):
    """The shape of a Transformer; the default has the size of the smallest HyenaDNA."""

    model_type: ClassVar[str] = "transformer"

    d_model: int = 128
    n_layer: int = 2
    n_head: int = 4
    """Heads of the queries; they divide `d_model`."""
    n_kv_head: int | None = None
    """Heads of the keys and values, a divisor of `n_head`; None is as many."""
    causal: bool = True
    """Decoder, for the next token; false is an encoder, for masked tokens."""
    bias: bool = True
    """Whether projections and MLPs have biases."""
    rotary_base: float = 10_000.0
    """Of the wavelengths of the rotary positions."""
    rotary_scaling: float = 1.0
    """Positions are divided by it."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.d_model, self.n_head, self.n_kv_head)
        # It refuses what it can't turn.
        Rotary(self.d_model // self.n_head, self.rotary_base, self.rotary_scaling)

    def build(self) -> "Transformer":
        return Transformer(self)


def _mixer(config: TransformerConfig, rotary: Rotary) -> Attention:
    return Attention(
        config.d_model,
        config.n_head,
        config.n_kv_head,
        causal=config.causal,
        rotary=rotary,
        qkv_bias=config.bias,
        out_bias=config.bias,
        dropout=config.attention_dropout,
    )


class Transformer(PreNorm):
    """The Transformer backbone."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        rotary = Rotary(config.d_model // config.n_head, config.rotary_base, config.rotary_scaling)
        mixers = (_mixer(config, rotary) for _ in range(config.n_layer))
        super().__init__(config, mixers, bias=config.bias)

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def streams(self) -> bool:
        return self.causal
