"""What every backbone promises: one vector a position, and what it says of itself."""

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genossm.nn.norm import added
from genossm.ops import kept

_KEPT_BYTES = 1 << 24
"""Checkpointing keeps what all blocks need where their residual streams take no more together.

What blocks keep is some twenty to forty times that. Of inputs so short the memory is small, and a GPU computes for less
time than asking it for everything once more takes.
"""
State = dict[str, Any]
"""What a streaming backbone carries from one position to the next; tensors have the batch first."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(ABC):
    """The shape of a backbone; its values are written to config.json.

    Raises:
        ValueError: a value is impossible; the message says what is allowed.
    """

    model_type: ClassVar[str]

    d_model: int
    """Width D of the residual stream."""
    n_layer: int
    """Number of blocks."""
    vocab_size: int = 12
    """Number of ids."""
    pad_vocab_size_multiple: int = 8
    """The embedding has this multiple of rows."""
    tokenizer: str = "char"
    """Name of the tokenizer that the ids come from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # YAML and JSON know lists alone; equal configs have to be equal whichever they came from.
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number; got {value!r}.")
        for field in dataclasses.fields(self):
            if field.name.endswith("dropout") and not 0 <= getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be in [0, 1); got {getattr(self, field.name)}.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows V of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @abstractmethod
    def build(self) -> "Backbone":
        """Return a backbone of this shape with fresh weights."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json, `model_type` first."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BackboneConfig":
        """Build the config of the class from plain values; nothing in them is imported or run.

        Raises:
            ValueError: a key is unknown or missing; the message names it.
        """
        given = {key: value for key, value in values.items() if key != "model_type"}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; it has: {', '.join(fields)}.")
        missing = [
            name
            for name, field in fields.items()
            if name not in given
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}.")
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**lists)


class Backbone(nn.Module, ABC):
    """A stack of blocks between an embedding and a final norm, with a language-model head.

    Subclasses set `embedding`, `layers` (each called with hidden states and a mask), `norm_f` and, where the head is
    not tied to the embedding, `lm_head`.
    """

    config: Any
    """The shape; each backbone's own subclass of `BackboneConfig`."""
    embedding: nn.Module
    layers: nn.ModuleList
    norm_f: nn.Module
    lm_head: nn.Module | None

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Recompute each block in the backward pass: memory for time; never changes a state-dict key.

        Short inputs are kept all the same: those of up to `_KEPT_BYTES` of residual stream.
        """

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Whether position t sees only positions up to t."""

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, or None where any length goes."""
        return None

    @property
    def d_output(self) -> int:
        """Width of the hidden states that `forward` returns."""
        return self.config.d_model

    @property
    def streams(self) -> bool:
        """Whether `init_state`, `extend` and `step` work: token by token, carrying a state."""
        return False

    @property
    def equivariant(self) -> bool:
        """Whether the reverse complement of a row gives its hidden states turned in time and in channels."""
        return False

    @property
    def packs(self) -> bool:
        """Whether `forward` takes `resets_BL`: several documents in one row, none of which sees another."""
        return False

    def check(self, ids_BL: Tensor, lengths_B: Tensor | None = None, resets_BL: Tensor | None = None) -> None:
        """Refuse input that would give a wrong result or an obscure error.

        Raises:
            ValueError: wrong shape, no token, too long, an id outside the vocabulary, impossible lengths, or documents
                packed for a backbone that can't keep them apart.
        """
        if ids_BL.ndim != 2 or ids_BL.shape[1] == 0:
            raise ValueError(f"ids must be (batch, length) with at least one token; got {tuple(ids_BL.shape)}.")
        if ids_BL.is_floating_point():
            raise ValueError(f"ids must be whole numbers; got {ids_BL.dtype}.")
        if self.max_length is not None and ids_BL.shape[1] > self.max_length:
            raise ValueError(
                f"The input has {ids_BL.shape[1]} tokens; this model takes at most {self.max_length}. Crop or tile it,"
                " or use a model with a longer context."
            )
        if ids_BL.device.type == "cpu" and ids_BL.numel():
            low, high = int(ids_BL.min()), int(ids_BL.max())
            if low < 0 or high >= self.config.padded_vocab_size:
                raise ValueError(
                    f"Ids must be in 0..{self.config.padded_vocab_size - 1}; got {low if low < 0 else high}. Does the"
                    f" tokenizer fit the model ({self.config.tokenizer!r})?"
                )
        if lengths_B is not None:
            if lengths_B.shape != ids_BL.shape[:1]:
                raise ValueError(f"lengths must be (batch,) = ({ids_BL.shape[0]},); got {tuple(lengths_B.shape)}.")
            if lengths_B.device.type == "cpu" and (int(lengths_B.min()) < 1 or int(lengths_B.max()) > ids_BL.shape[1]):
                raise ValueError(f"Each length must be in 1..{ids_BL.shape[1]}; got {lengths_B.tolist()}.")
        if resets_BL is not None:
            if not self.packs:
                raise ValueError(f"{self.config.model_type} can't keep packed documents apart; give each its own row.")
            if resets_BL.shape != ids_BL.shape:
                raise ValueError(f"resets must be {tuple(ids_BL.shape)} like the ids; got {tuple(resets_BL.shape)}.")

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Return the embeddings of ids of any integer type."""
        return self.embedding(ids_BL.int())

    def forward(
        self,
        ids_BL: Integer[Tensor, "B L"],
        lengths_B: Integer[Tensor, " B"] | None = None,
        resets_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Return one vector a position, after the final norm.

        Args:
            ids_BL: token ids of any integer type.
            lengths_B: number of real tokens of each row, which must stand on the left; what follows them is padding
                and changes no real position. None: all are real.
            resets_BL: true where a document starts that must not see what stands before it, nor be seen from there.
                Backbones whose `packs` is false take none.

        Raises:
            ValueError: see `check`.
        """
        self.check(ids_BL, lengths_B, resets_BL)
        return added(self.norm_f, self.run_layers(self.embed(ids_BL), lengths_B, resets_BL=resets_BL), None)[1]

    def context(self, length: int, lengths_B: Tensor | None, resets_BL: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return what each layer gets beside x: here the mask of real positions, where padding could be seen."""
        if lengths_B is None or self.causal:
            return (None,)
        return (length_mask(lengths_B, length),)

    def run_layers(
        self,
        x_BLD: Tensor,
        lengths_B: Tensor | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        resets_BL: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks over embeddings; `visit(i, x_BLD)` sees the residual stream after block i (from 0)."""
        context = self.context(x_BLD.shape[1], lengths_B, resets_BL)
        again = self.gradient_checkpointing and torch.is_grad_enabled() and self._long(x_BLD)
        for index, layer in enumerate(self.layers):
            if again:
                x_BLD = cast(Tensor, checkpoint(layer, x_BLD, *context, use_reentrant=False, context_fn=kept.region))
            else:
                x_BLD = layer(x_BLD, *context)
            if visit is not None:
                visit(index, x_BLD)
        return x_BLD

    def _long(self, x_BLD: Tensor) -> bool:
        """Tell whether what the blocks keep of such an input is worth making again."""
        return x_BLD.numel() * x_BLD.element_size() * len(self.layers) > _KEPT_BYTES

    def logits(self, x_BLD: Tensor) -> Tensor:
        """Return the language-model logits (…, V) of hidden states (…, D) that `forward` returned."""
        if self.lm_head is not None:
            return self.lm_head(x_BLD)
        return nn.functional.linear(x_BLD, cast(Tensor, self.embedding.weight))

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token: that of each layer, which has `init_state` and `extend`.

        Raises:
            ValueError: this backbone can't run token by token.
        """
        if not self.streams:
            raise ValueError(f"{self.config.model_type} can't run token by token; run the whole sequence.")
        return {"length": 0, "layers": [cast(Any, layer).init_state(batch_size) for layer in self.layers]}

    def extend(
        self,
        ids_BL: Integer[Tensor, "B L"],
        state: State,
        visit: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """Run more tokens after those that made `state`; returns hidden states of these and the state after them.

        The given state stays as it was, so that several continuations may start from it. `visit` is that of
        `run_layers`.

        Raises:
            ValueError: see `check`; or tokens and state together are longer than the model's context.
        """
        self.check(ids_BL)
        length = state["length"] + ids_BL.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"The sequence would have {length} tokens; this model takes at most {self.max_length}.")
        x_BLD = self.embed(ids_BL)
        layers: list[State] = []
        for index, (layer, before) in enumerate(zip(self.layers, state["layers"], strict=True)):
            x_BLD, after = cast(Any, layer).extend(x_BLD, before)
            layers.append(after)
            if visit is not None:
                visit(index, x_BLD)
        return self.norm_f(x_BLD), {"length": length, "layers": layers}

    def step(self, ids_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one more token of each row; returns x_BD and the state after it."""
        x_BLD, state = self.extend(ids_B[:, None], state)
        return x_BLD[:, -1], state

    def num_parameters(self) -> int:
        """Return the number of trained values, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def length_mask(lengths_B: Tensor, length: int) -> Tensor:
    """Return mask_BL, true at the first `lengths_B` positions of each row."""
    return torch.arange(length, device=lengths_B.device) < lengths_B[:, None]


def lengths_of(mask_BL: Tensor) -> Tensor:
    """Return the lengths of a padding mask whose real positions stand on the left.

    Raises:
        ValueError: the mask has another shape, an empty row, or a hole.
    """
    if mask_BL.ndim != 2:
        raise ValueError(f"A mask must be (batch, length); got {tuple(mask_BL.shape)}.")
    lengths_B = mask_BL.bool().sum(1)
    if not torch.equal(length_mask(lengths_B, mask_BL.shape[1]), mask_BL.bool()) or bool((lengths_B == 0).any()):
        raise ValueError(
            "A mask must be true on the left and false on the right of each row, with no hole and no empty row: what"
            " stands behind a hole would be read as if it were next to what stands before it."
        )
    return lengths_B


def model_types() -> dict[str, type[BackboneConfig]]:
    """Return every backbone's config class by its `model_type`: the modules of this folder are the list."""
    import genossm.models as shelf

    found: dict[str, type[BackboneConfig]] = {}
    for module in pkgutil.iter_modules(shelf.__path__):
        loaded = importlib.import_module(f"{shelf.__name__}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, BackboneConfig) and hasattr(value, "model_type"):
                found[value.model_type] = value
    return found


def config_from_dict(values: Mapping[str, Any]) -> BackboneConfig:
    """Return the config that a config.json describes: `model_type` is looked up in this folder, nothing is executed.

    Raises:
        ValueError: no such `model_type`, or a value that the config refuses.
    """
    types = model_types()
    name = values.get("model_type")
    if name not in types:
        raise ValueError(f"No backbone has model_type={name!r}; there are: {', '.join(sorted(types))}.")
    return types[name].from_dict(values)
