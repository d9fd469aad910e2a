"""Published layouts of checkpoints: how a family names its config values and its tensors, beside ours.

A layout is a table of two columns, theirs and ours, that must cover a file exactly. `{i}` and `{j}` stand for numbers,
`{p}` for `weight` or `bias`. Ours is a name of the backbone's state dict, or `head.…`, a name of its sequence head.
Ours ends in `?` where a backbone may do without the tensor because it can compute it; `None` is dropped on purpose:
it can be computed again (`Layout.regenerate`), or nothing reads it.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from genossm.models.base import Backbone, BackboneConfig
from genossm.nn.head import HeadConfig

MISSING: Any = object()
_NUMBER = re.compile(r"\d+")

_HUGGINGFACE = """
_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _from_model_config _output_attentions
add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
transformers_version typical_p use_bfloat16 use_cache
"""
HUGGINGFACE_KEYS = frozenset(_HUGGINGFACE.split())
"""Keys that any HuggingFace config may hold and that say nothing about a backbone's numbers."""


class PublishedConfig:
    """A published config.json as it is read: each key is taken once, and what nobody took is refused.

    Args:
        values: the config.
        source: where it comes from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = MISSING) -> Any:
        """Return a value; without a default it must be there.

        Raises:
            ValueError: it is not.
        """
        self._taken.add(key)
        value = self.values.get(key, default)
        if value is MISSING:
            raise ValueError(f"The config of {self.source} has no {key}.")
        return _plain(value)

    def whole(self, key: str, default: Any = MISSING, least: int = 1) -> int:
        """Return a whole number of at least `least`.

        Raises:
            ValueError: it is missing, none, or smaller.
        """
        value = self.take(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, value, f"a whole number of at least {least}")
        return value

    def whole_or_none(self, key: str, least: int = 1) -> int | None:
        """Return a whole number, or None where the key is missing or null.

        Raises:
            ValueError: it is something else.
        """
        return None if self.take(key, None) is None else self.whole(key, least=least)

    def number(self, key: str, default: Any = MISSING, least: float = 0.0) -> float:
        """Return a finite number of at least `least`.

        Raises:
            ValueError: it is missing, none, or smaller.
        """
        value = self.take(key, default)
        fine = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf
        if not fine:
            raise self._wrong(key, value, f"a number of at least {least:g}")
        return float(value)

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """Return true or false; null is the default.

        Raises:
            ValueError: it is missing or something else.
        """
        value = self.take(key, default)
        value = default if value is None and default is not MISSING else value
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def indices(self, key: str, default: Any = MISSING) -> tuple[int, ...]:
        """Return a list of numbers from 0 on; null is none.

        Raises:
            ValueError: it is missing or something else.
        """
        value = self.take(key, default)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or any(type(i) is not int or i < 0 for i in value):
            raise self._wrong(key, value, "a list of whole numbers from 0 on")
        return tuple(value)

    def _wrong(self, key: str, value: Any, allowed: str) -> ValueError:
        return ValueError(f"{key} must be {allowed} in the config of {self.source}; got {value!r}.")

    def require(self, key: str, allowed: Iterable[Any], default: Any = MISSING) -> Any:
        """Return a value of which only some are supported.

        Raises:
            ValueError: it is another; the message names the key and what is allowed.
        """
        value = self.take(key, default)
        choices = list(allowed)
        # True is no 1 here.
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
            shown = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{key}={value!r} in the config of {self.source} is not supported; supported: {shown}.")
        return value

    def section(self, key: str) -> "PublishedConfig":
        """Return a nested config.

        Raises:
            ValueError: it is no mapping.
        """
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a mapping in the config of {self.source}; got {value!r}.")
        return PublishedConfig(value, f"{self.source} ({key})")

    def ignore(self, *keys: str) -> None:
        """Mark keys as known and of no meaning for a backbone's numbers."""
        self._taken.update(keys)

    def finish(self) -> None:
        """Refuse keys that nobody took.

        Raises:
            ValueError: it names them.
        """
        unknown = sorted(set(self.values) - self._taken - HUGGINGFACE_KEYS)
        if unknown:
            raise ValueError(f"The config of {self.source} has unknown keys: {', '.join(unknown)}.")

    @property
    def architecture(self) -> str:
        """The class that the file was saved from, or an empty string.

        Raises:
            ValueError: `architectures` is no list of names.
        """
        named = self.values.get("architectures") or [""]
        if isinstance(named, str) or not isinstance(named, Sequence) or not all(isinstance(n, str) for n in named):
            raise self._wrong("architectures", named, "a list of names")
        return str(named[0])

    def check_head(self, suffix: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a file without the head (tensor `name`) that its class has, the one that ends in `suffix`.

        Raises:
            ValueError: the head is missing.
        """
        if self.architecture.endswith(suffix) and name not in tensors:
            raise ValueError(f"{name} is missing in {self.source}: it is the head of a {self.architecture}.")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels: of `id2label` in the order of its ids, else `num_labels` of them, else two.

        Raises:
            ValueError: `id2label` doesn't name ids from 0 on, or `num_labels` is no number of labels.
        """
        named = self.values.get("id2label")
        if not named:
            count = self.values.get("num_labels")
            return tuple(f"LABEL_{i}" for i in range(2 if count is None else self.whole("num_labels")))
        if not isinstance(named, Mapping) or sorted(map(str, named)) != sorted(map(str, range(len(named)))):
            raise self._wrong("id2label", named, "a name for each id from 0 on")
        by_id = {int(key): str(name) for key, name in named.items()}
        return tuple(by_id[i] for i in range(len(by_id)))


def _plain(value: Any) -> Any:
    """Return a value of a config; transformers 5 writes what JSON has no number for as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_plain(inside) for inside in value]
    if isinstance(value, Mapping) and list(value) == ["__float__"]:
        return {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}.get(value["__float__"], value)
    return value


def labelled(labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what a head's config says of its answers: how many, and their names where these say anything."""
    plain = all(name == f"LABEL_{i}" for i, name in enumerate(labels))
    return {"n_outputs": len(labels), "names": () if plain else labels}


def label_keys(head: HeadConfig | None) -> dict[str, Any]:
    """Return what a published config says of a head's answers."""
    if head is None:
        return {}
    names = head.names or tuple(f"LABEL_{i}" for i in range(head.n_outputs))
    return {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def check_export(head: HeadConfig, poolings: Iterable[str], **shape: Any) -> None:
    """Refuse a head that a layout has no way to write.

    Args:
        head: the head.
        poolings: what the published one can do.
        shape: other values of `HeadConfig` that it has.

    Raises:
        ValueError: the head is another; the message names the value.
    """
    allowed = {"pooling": tuple(poolings), "strands": (1,), "bin": (1,), "hidden": (False,), "positions": (0,)}
    allowed |= {key: (value,) for key, value in shape.items()}
    for key, choices in allowed.items():
        if getattr(head, key) not in choices:
            shown = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"The head of this layout has {key}={shown}; the model's has {getattr(head, key)!r}.")


class Layout(ABC):
    """One published layout of one backbone; stateless."""

    name: ClassVar[str]
    """What `genossm convert` calls it."""
    model_type: ClassVar[str]
    """The backbone's own name."""
    keys: ClassVar[tuple[tuple[str, str | None], ...]]
    """Theirs beside ours."""
    words: ClassVar[Mapping[str, str]] = {}
    """What our config calls otherwise than theirs, for messages: our word to theirs."""
    prefixes: ClassVar[tuple[str, ...]] = ()
    """What may stand before a tensor's name in the table."""

    @abstractmethod
    def matches(self, values: Mapping[str, Any], names: Iterable[str]) -> bool:
        """Tell whether a config and the names of the tensors are of this layout."""

    @abstractmethod
    def read_config(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> BackboneConfig:
        """Return our config; what a config doesn't say may be read from the shapes.

        Raises:
            ValueError: a value is missing, unknown, or not supported.
        """

    def read_head(self, config: PublishedConfig, tensors: Mapping[str, Tensor]) -> HeadConfig | None:
        """Return the shape of the sequence head in the file, or None where there is none."""
        return None

    @abstractmethod
    def write_config(self, backbone: Backbone, head: HeadConfig | None) -> dict[str, Any]:
        """Return the published config of a backbone."""

    def bare(self, name: str) -> str:
        """Return a tensor's name as the table writes it."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
        return name

    def ours(self, name: str) -> tuple[bool, str | None]:
        """Return whether the table knows a published name, and ours (with its `?`)."""
        bare = self.bare(name)
        # Names that differ in their numbers alone mostly stand in the same row.
        kin = _NUMBER.sub("#", bare)
        rows = self._patterns if kin not in self._rows else (self._rows[kin], *self._patterns)
        for row in rows:
            match = row[0].fullmatch(bare)
            if match:
                self._rows[kin] = row
                return True, None if row[1] is None else row[1].format(**match.groupdict())
        return False, None

    def stand_in(self, name: str) -> str | None:
        """Return which of our tensors stands for `name` in a model that has no tensor of that name, or None."""
        return "embedding.weight" if name == "lm_head.weight" else None

    def theirs(self, name: str, config: BackboneConfig) -> str | None:
        """Return the published name of one of ours, or None where the layout has none."""
        for theirs, ours in self.keys:
            match = None if ours is None else _pattern(ours.rstrip("?")).fullmatch(name)
            if match:
                return theirs.format(**match.groupdict())
        return None

    def full(self, name: str, head: HeadConfig | None) -> str:
        """Return the name in a new file of a tensor that the table calls `name`."""
        return name

    def fit(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor (bare name) in the shape of ours."""
        return tensor

    def unfit(self, name: str, tensor: Tensor) -> Tensor:
        """Return one of our tensors in the published shape (bare name): the inverse of `fit`."""
        return tensor

    def regenerable(self, config: BackboneConfig) -> list[str]:
        """Return the bare names of the tensors that a published file holds and ours may do without."""
        return []

    def required(self, config: BackboneConfig, architecture: str) -> list[str]:
        """Return the bare names of tensors that a file of some class must hold although ours may do without."""
        return []

    def misfit(self, name: str, tensor: Tensor, backbone: Backbone) -> str | None:
        """Return what is wrong with a tensor (bare name) that no place of ours takes, or None.

        What can be computed again must be what is computed; what can't is not looked at.
        """
        again = self.regenerate(name, backbone)
        if again is None:
            return None
        if again.shape != tensor.shape:
            return f"has shape {tuple(tensor.shape)} instead of {tuple(again.shape)}"
        close = torch.allclose(tensor.double(), again.double().to(tensor.device), rtol=1e-2, atol=1e-6)
        return None if close else "differs from what the config gives for it, and this model can't hold another"

    def constant(self, name: str, config: BackboneConfig) -> Tensor | None:
        """Return the value of one of our tensors that files of this layout don't hold, or None where they hold it."""
        return None

    def regenerate(self, name: str, backbone: Backbone) -> Tensor | None:
        """Return a dropped tensor of a published file (bare name), computed again, or None where nothing tells it."""
        return None

    @cached_property
    def _rows(self) -> dict[str, tuple[re.Pattern[str], str | None]]:
        """The row of the table that names of a kind stood in so far."""
        return {}

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str | None], ...]:
        return tuple((_pattern(theirs), ours) for theirs, ours in self.keys)


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    text = text.replace(r"\{p\}", "(?P<p>weight|bias)")
    return re.compile(re.sub(r"\\{([ij])\\}", r"(?P<\1>\\d+)", text))
