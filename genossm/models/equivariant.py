"""Any backbone of the house made equivariant to the reverse complement: both strands through it, side by side.

With a trained model inside, this is the post-hoc conjoining of Caduceus-Ph; trained as a whole, its weights are shared
between the strands from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from genossm.models.base import Backbone, BackboneConfig, config_from_dict
from genossm.nn.rc import (
    CHAR_COMPLEMENT,
    both_rows,
    both_strands,
    check_complement,
    complement_tensor,
    join_strands,
    split_strands,
)


@dataclass(frozen=True, kw_only=True)
class EquivariantConfig(BackboneConfig):
    """A backbone inside and the complement of its ids; width, depth and vocabulary are those of the backbone.

    Raises:
        ValueError: there is no such backbone, a value given here differs from its own, or the complement is none.
    """

    model_type: ClassVar[str] = "equivariant"

    d_model: Any = None
    n_layer: Any = None
    backbone: Mapping[str, Any] | BackboneConfig = field(default_factory=lambda: {"model_type": "caduceus"})
    """The config of the backbone inside, or its plain values with `model_type`."""
    complement_map: Sequence[int] = CHAR_COMPLEMENT
    """The complement of each id."""

    def __post_init__(self) -> None:
        if isinstance(self.backbone, BackboneConfig):
            object.__setattr__(self, "backbone", self.backbone.to_dict())
        inside = self.inside
        for name in ("d_model", "n_layer"):
            given, own = getattr(self, name), getattr(inside, name)
            if given not in (None, own):
                raise ValueError(f"{name} is that of the backbone inside, {own}; got {given}. Set backbone.{name}.")
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tokenizer"):
            object.__setattr__(self, name, getattr(inside, name))
        super().__post_init__()
        check_complement(self.complement_map, self.padded_vocab_size)

    def to_dict(self) -> dict[str, Any]:
        # Written once, inside.
        return {**super().to_dict(), "d_model": None, "n_layer": None}

    @property
    def inside(self) -> BackboneConfig:
        """The config of the backbone inside."""
        assert not isinstance(self.backbone, BackboneConfig)
        return config_from_dict(self.backbone)

    def build(self) -> "Equivariant":
        return Equivariant(self)


class Equivariant(Backbone):
    """The wrapper: `forward` gives (B, L, 2 D), and the reverse complement of a row gives it turned in both axes."""

    def __init__(self, config: EquivariantConfig):
        super().__init__(config)
        self.config: EquivariantConfig = config
        self.backbone = config.inside.build()
        complement_V = complement_tensor(config.complement_map, config.padded_vocab_size)
        self.register_buffer("complement_V", complement_V, persistent=False)
        self.complement_V: Tensor

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the backbone inside."""
        return self.backbone.layers

    @property
    def embedding(self) -> nn.Module:
        """The embedding of the backbone inside."""
        return self.backbone.embedding

    @property
    def causal(self) -> bool:
        # What follows a position precedes it on the other strand.
        return False

    @property
    def max_length(self) -> int | None:
        return self.backbone.max_length

    @property
    def d_output(self) -> int:
        return 2 * self.backbone.d_output

    @property
    def equivariant(self) -> bool:
        return True

    @property
    def packs(self) -> bool:
        return self.backbone.packs

    def embed(self, ids_BL: Tensor) -> Tensor:
        other_BL = self.complement_V[ids_BL.int()]
        return torch.cat([self.backbone.embed(ids_BL), self.backbone.embed(other_BL).flip(-1)], dim=-1)

    def norm_f(self, x_BLD2: Tensor) -> Tensor:
        """Normalise each half as the backbone inside does."""
        given, other = x_BLD2.chunk(2, dim=-1)
        return torch.cat([self.backbone.norm_f(given), self.backbone.norm_f(other.flip(-1)).flip(-1)], dim=-1)

    def forward(
        self,
        ids_BL: Integer[Tensor, "B L"],
        lengths_B: Integer[Tensor, " B"] | None = None,
        resets_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        self.check(ids_BL, lengths_B, resets_BL)
        self.backbone.gradient_checkpointing = self.gradient_checkpointing
        ids_SL, lengths_S, resets_SL = both_strands(ids_BL, self.complement_V, lengths_B, resets_BL)
        return join_strands(self.backbone(ids_SL, lengths_S, resets_SL), lengths_B)

    def run_layers(
        self,
        x_BLD: Tensor,
        lengths_B: Tensor | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        resets_BL: Tensor | None = None,
    ) -> Tensor:
        def visit_joined(index: int, x_SLD: Tensor) -> None:
            if visit is not None:
                visit(index, join_strands(x_SLD, lengths_B))

        self.backbone.gradient_checkpointing = self.gradient_checkpointing
        lengths_S, resets_SL = both_rows(lengths_B, resets_BL)
        x_SLD = self.backbone.run_layers(split_strands(x_BLD, lengths_B), lengths_S, visit_joined, resets_SL)
        return join_strands(x_SLD, lengths_B)

    def logits(self, x_BLD: Tensor) -> Tensor:
        """Return the mean of both strands' logits, the other's complemented."""
        given, other = x_BLD.chunk(2, dim=-1)
        return (self.backbone.logits(given) + self.backbone.logits(other.flip(-1))[..., self.complement_V]) / 2
