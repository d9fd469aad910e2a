"""HyenaDNA: long gated convolutions, one base a token, up to 1 M bases (Nguyen et al. 2023, arXiv:2306.15794)."""

from dataclasses import dataclass
from typing import ClassVar

from genossm.models.prenorm import PreNorm, PreNormConfig
from genossm.nn.hyena import HyenaOperator


@dataclass(frozen=True, kw_only=True)
class HyenaDNAConfig(PreNormConfig):
    """The shape of a HyenaDNA; defaults are those of the published models, without their dropout."""

    model_type: ClassVar[str] = "hyenadna"

    embed_dropout: float = 0.0
    """Dropout of the embeddings; the published models were pretrained with 0.1."""

    d_model: int = 128
    n_layer: int = 2
    max_length: int = 1026
    """Longest input, and what the filter's time is normalised by (published as l_max: the context + 2)."""
    order: int = 2
    """Gates of the operator, at least 2."""
    emb_dim: int = 5
    """Positional features of the filter, odd, at least 3."""
    filter_order: int = 64
    """Width of the filter's network."""
    num_inner_mlps: int = 2
    """Hidden layers of the filter's network after the first."""
    short_filter_order: int = 3
    """Taps of the short convolution."""
    frequency: float = 10.0
    """Initial frequency of the filter's sines."""
    train_freq: bool = True
    """Whether the frequencies are trained."""
    modulate: bool = True
    """Whether the filters stand under an exponential window."""
    shift: float = 0.05
    """Floor of the filter's window; the published inference code has 0.05, the published training code 0."""
    final_norm_eps: float | None = None
    """Epsilon of the last LayerNorm where it differs."""
    own_positions: bool = False
    """Whether each filter holds its positional features, trained, instead of computing them."""
    own_decay: bool = False
    """Whether each filter holds the decays of its window instead of computing them."""
    hyena_dropout: float = 0.0
    """Dropout inside the operator."""
    bidirectional: bool = False
    """Give every filter a twin over what follows: a position sees both sides, for masked language modelling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order < 2:
            raise ValueError(f"order must be at least 2; got {self.order}.")
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3; got {self.emb_dim}.")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}.")

    def build(self) -> "HyenaDNA":
        return HyenaDNA(self)


def _mixer(config: HyenaDNAConfig) -> HyenaOperator:
    return HyenaOperator(
        config.d_model,
        config.max_length,
        order=config.order,
        short_filter_order=config.short_filter_order,
        bidirectional=config.bidirectional,
        dropout=config.hyena_dropout,
        emb_dim=config.emb_dim,
        filter_order=config.filter_order,
        num_inner_mlps=config.num_inner_mlps,
        frequency=config.frequency,
        train_freq=config.train_freq,
        shift=config.shift,
        modulate=config.modulate,
        own_positions=config.own_positions,
        own_decay=config.own_decay,
    )


class HyenaDNA(PreNorm):
    """The HyenaDNA backbone."""

    config: HyenaDNAConfig

    def __init__(self, config: HyenaDNAConfig):
        mixers = (_mixer(config) for _ in range(config.n_layer))
        super().__init__(config, mixers, final_norm_eps=config.final_norm_eps)

    @property
    def causal(self) -> bool:
        return not self.config.bidirectional

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def streams(self) -> bool:
        return self.causal
