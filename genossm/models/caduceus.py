"""Caduceus (Schiff et al. 2024): Mamba both ways for masked language modelling, on one strand (Ph) or on both (PS)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.block import Block
from genossm.nn.mamba import BiMamba, Mamba, MambaShape, StepInit, init_mamba_
from genossm.nn.norm import added
from genossm.nn.rc import (
    CHAR_COMPLEMENT,
    StrandNorm,
    both_rows,
    both_strands,
    check_complement,
    complement_tensor,
    join_strands,
    split_strands,
    strand_logits,
)


@dataclass(frozen=True, kw_only=True)
class CaduceusConfig(BackboneConfig):
    """The shape of a Caduceus, in the words of the published config.json; defaults are those of the released models."""

    model_type: ClassVar[str] = "caduceus"

    d_model: int = 256
    n_layer: int = 4
    d_state: int = 16
    """States N of a channel."""
    d_conv: int = 4
    """Taps W of the short convolution."""
    expand: int = 2
    """Inner width over d_model."""
    dt_rank: int | str = "auto"
    """Width R of the step sizes' bottleneck; "auto" is d_model / 16, rounded up."""
    dt_init: str = "random"
    """How the step sizes' projection is drawn: "random" or "constant"."""
    dt_scale: float = 1.0
    """Scale of that draw."""
    dt_min: float = 1e-3
    """Smallest step size that a fresh layer draws; see `StepInit`."""
    dt_max: float = 0.1
    """Largest step size that a fresh layer draws."""
    dt_init_floor: float = 1e-4
    """Floor of the drawn step sizes."""
    bias: bool = False
    """Whether the projections in and out of a mixer have biases."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    rms_norm: bool = True
    """RMS norms; else LayerNorms."""
    norm_epsilon: float = 1e-5
    """Epsilon of every norm."""
    bidirectional: bool = True
    """Whether each layer reads both ways; without, it is a Mamba."""
    bidirectional_strategy: str = "add"
    """How the directions are joined: "add" or "ew_multiply"."""
    bidirectional_weight_tie: bool = True
    """Whether the directions share their projections in and out."""
    rcps: bool = False
    """Run both strands through the same weights (PS): equivariant to the reverse complement, and twice as wide
    outside. d_model is the width of one strand."""
    fused_add_norm: bool = True
    """In PS, the convention of the released models, whose fused path exchanges the strands at every block: each block
    reads its input backwards in time and in channels. False is the plain convention of the paper. Both are
    equivariant; weights of one are wrong in the other."""
    complement_map: Sequence[int] = CHAR_COMPLEMENT
    """The complement of each id."""
    tie_embeddings: bool = True
    """Whether the language-model head is the embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_complement(self.complement_map, self.padded_vocab_size)
        # The mixer's own shape refuses what it can't be.
        self.shape  # noqa: B018

    @property
    def shape(self) -> MambaShape:
        """The shape of each direction of a mixer."""
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
            steps=StepInit(dt_min=self.dt_min, dt_max=self.dt_max, dt_init_floor=self.dt_init_floor),
        )

    def build(self) -> "Caduceus":
        return Caduceus(self)


class CaduceusBlock(Block):
    """A pre-norm block of one mixer that may read its input backwards in time and in channels.

    A mirrored block gives what the block would give for the turned input, turned back; its weights turn instead of
    its input (see `CaduceusConfig.fused_add_norm`).
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, mirrored: bool):
        super().__init__(norm, mixer)
        self.mirrored = mirrored

    def forward(self, x_BLD: Tensor, *context: Tensor | None) -> Tensor:
        if not self.mirrored:
            return super().forward(x_BLD, *context)
        x_BLD, normed_BLD = added(self.norm1, x_BLD, None, turned=True)
        return self._add(x_BLD, self.mixer(normed_BLD, *context, mirrored=True))


class Caduceus(Backbone):
    """The Caduceus backbone."""

    def __init__(self, config: CaduceusConfig):
        super().__init__(config)
        self.config: CaduceusConfig = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(self._block(index) for index in range(config.n_layer))
        norm = self._norm()
        self.norm_f = StrandNorm(norm) if config.rcps else norm
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        )
        complement_V = complement_tensor(config.complement_map, config.padded_vocab_size)
        self.register_buffer("complement_V", complement_V, persistent=False)
        self.complement_V: Tensor
        init_mamba_(self, config.n_layer)

    def _norm(self) -> nn.Module:
        config = self.config
        kind = nn.RMSNorm if config.rms_norm else nn.LayerNorm
        return kind(config.d_model, eps=config.norm_epsilon)

    def _block(self, index: int) -> CaduceusBlock:
        config = self.config
        mixer = (
            BiMamba(config.shape, config.bidirectional_strategy, config.bidirectional_weight_tie)
            if config.bidirectional
            else Mamba(config.shape)
        )
        # Exchanged strands at every block are, seen from each strand, every other block turned round.
        return CaduceusBlock(self._norm(), mixer, mirrored=self._swaps and index % 2 == 0)

    @property
    def _swaps(self) -> bool:
        return self.config.rcps and self.config.fused_add_norm

    @property
    def causal(self) -> bool:
        return not self.config.bidirectional and not self.config.rcps

    @property
    def streams(self) -> bool:
        return self.causal

    @property
    def d_output(self) -> int:
        return self.config.d_model * (2 if self.config.rcps else 1)

    @property
    def equivariant(self) -> bool:
        return self.config.rcps

    @property
    def packs(self) -> bool:
        return True

    def context(self, length: int, lengths_B: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor | None, ...]:
        return (lengths_B, resets_BL)

    def embed(self, ids_BL: Tensor) -> Tensor:
        x_BLD = super().embed(ids_BL)
        if not self.config.rcps:
            return x_BLD
        # Position by position the other strand is the complement, its channels in reverse order.
        return torch.cat([x_BLD, super().embed(self.complement_V[ids_BL.int()]).flip(-1)], dim=-1)

    def forward(
        self,
        ids_BL: Integer[Tensor, "B L"],
        lengths_B: Integer[Tensor, " B"] | None = None,
        resets_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        if not self.config.rcps:
            return super().forward(ids_BL, lengths_B, resets_BL)
        self.check(ids_BL, lengths_B, resets_BL)
        ids_SL, lengths_S, resets_SL = both_strands(ids_BL, self.complement_V, lengths_B, resets_BL)
        x_SLD = super().run_layers(super().embed(ids_SL), lengths_S, resets_BL=resets_SL)
        # Strand by strand, as narrow as the norm's result: joined first, both strands would be there twice.
        swapped = self._swaps and len(self.layers) % 2 == 1
        _, normed_SLD = added(cast(StrandNorm, self.norm_f).norm, x_SLD, None, turned=swapped)
        return self._joined(normed_SLD, lengths_B, len(self.layers))

    def run_layers(
        self,
        x_BLD: Tensor,
        lengths_B: Tensor | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        resets_BL: Tensor | None = None,
    ) -> Tensor:
        if not self.config.rcps:
            return super().run_layers(x_BLD, lengths_B, visit, resets_BL)

        def visit_joined(index: int, x_SLD: Tensor) -> None:
            if visit is not None:
                visit(index, self._joined(x_SLD, lengths_B, index + 1))

        lengths_S, resets_SL = both_rows(lengths_B, resets_BL)
        x_SLD = super().run_layers(split_strands(x_BLD, lengths_B), lengths_S, visit_joined, resets_SL)
        return self._joined(x_SLD, lengths_B, len(self.layers))

    def _joined(self, x_SLD: Tensor, lengths_B: Tensor | None, blocks: int) -> Tensor:
        """Show both strands side by side as the released models do after so many blocks."""
        return join_strands(x_SLD, lengths_B, swapped=self._swaps and blocks % 2 == 1)

    def logits(self, x_BLD: Tensor) -> Tensor:
        if not self.config.rcps:
            return super().logits(x_BLD)
        weight_VD = cast(nn.Linear | nn.Embedding, self.embedding if self.lm_head is None else self.lm_head).weight
        return strand_logits(x_BLD, weight_VD, self.complement_V)
