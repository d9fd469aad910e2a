"""What HyenaDNA, the Transformer and the CNN share: pre-norm blocks of a mixer and an MLP, dropout, a head."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.block import Block
from genossm.nn.init import init_linear_
from genossm.nn.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class PreNormConfig(BackboneConfig):
    """The part of a shape that is not the mixers'."""

    d_inner: int | None = None
    """Width F of the MLPs; None is 4 D."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    embed_dropout: float = 0.1
    """Dropout of the embeddings."""
    residual_dropout: float = 0.0
    """Dropout of what each mixer and MLP adds."""
    tie_embeddings: bool = True
    """Whether the language-model head is the embedding."""


class PreNorm(Backbone):
    """Embedding, a block around each mixer, LayerNorm, head.

    Args:
        config: the shape.
        mixers: one a layer; drawn one by one, so that a seed gives the same weights however many there are.
        bias: whether the MLPs have biases.
        final_norm_eps: epsilon of the last LayerNorm; None is that of the others.
    """

    def __init__(
        self, config: PreNormConfig, mixers: Iterable[nn.Module], bias: bool = True, final_norm_eps: float | None = None
    ):
        super().__init__(config)
        width, eps = config.d_model, config.layer_norm_eps
        self.embedding = nn.Embedding(config.padded_vocab_size, width)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(
            Block(
                nn.LayerNorm(width, eps=eps),
                mixer,
                nn.LayerNorm(width, eps=eps),
                MLP(width, config.d_inner or 4 * width, bias=bias),
                dropout=config.residual_dropout,
            )
            for mixer in mixers
        )
        self.norm_f = nn.LayerNorm(width, eps=final_norm_eps or eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(width, config.padded_vocab_size, bias=False)
        init_linear_(self, config.n_layer)

    def embed(self, ids_BL: Tensor) -> Tensor:
        return self.dropout(super().embed(ids_BL))
