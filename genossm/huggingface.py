"""A folder that transformers opens with torch alone: config, weights, tokenizer, card, and one file of model code.

The code is our own: the modules that the model is built from, merged into a single plain file (see `merged`), and thin
classes around them in the manner of transformers 5.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import genossm
from genossm.layouts.base import label_keys
from genossm.models.base import Backbone
from genossm.models.classifier import Classifier


def write_files(model: Backbone | Classifier, notes: dict[str, Any], folder: Path) -> None:
    """Write a model for transformers.

    Args:
        model: a backbone, or one under a head.
        notes: training data and metrics for the model card.
        folder: an empty folder.

    Raises:
        ValueError: see `named_tensors`.
    """
    from safetensors.torch import save_file

    classifier = model if isinstance(model, Classifier) else None
    backbone = backbone_of(model)
    # Apart, since safetensors refuses memory that is shared.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in named_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(backbone, classifier))
    (folder / "configuration_genossm.py").write_text(_CONFIGURATION)
    (folder / "modeling_genossm.py").write_text(_modeling(backbone))
    (folder / "tokenization_genossm.py").write_text(_TOKENIZATION)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(backbone))
    (folder / "README.md").write_text(_card(backbone, classifier, notes))


def named_tensors(model: Backbone | Classifier) -> dict[str, Tensor]:
    """Return every parameter and buffer by each of its names in the folder: what transformers doesn't find it makes up.

    Raises:
        ValueError: the model is inside a wrapper that only genossm has.
    """
    if type(backbone_of(model)).__module__.endswith(".equivariant"):
        raise ValueError(
            "A backbone inside an equivariant wrapper can't be written for transformers; write the inside."
        )
    parts: dict[str, nn.Module] = {"backbone": backbone_of(model)}
    if isinstance(model, Classifier):
        parts["head"] = model.head
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in named
    }


def backbone_of(model: Backbone | Classifier) -> Backbone:
    """Return the backbone of a model."""
    return model if isinstance(model, Backbone) else model.backbone


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _config(backbone: Backbone, classifier: Classifier | None) -> dict[str, Any]:
    language = "GenossmForCausalLM" if backbone.causal else "GenossmForMaskedLM"
    head = None if classifier is None else classifier.head.config
    return {
        "model_type": "genossm",
        "architectures": [language if head is None else "GenossmForSequenceClassification"],
        "auto_map": {
            "AutoConfig": "configuration_genossm.GenossmConfig",
            "AutoModel": "modeling_genossm.GenossmModel",
            "AutoModelForCausalLM": "modeling_genossm.GenossmForCausalLM",
            "AutoModelForMaskedLM": "modeling_genossm.GenossmForMaskedLM",
            "AutoModelForSequenceClassification": "modeling_genossm.GenossmForSequenceClassification",
            "AutoTokenizer": ["tokenization_genossm.GenossmTokenizer", None],
        },
        "backbone": backbone.config.to_dict(),
        "head": None if head is None else head.to_dict(),
        "vocab_size": backbone.config.padded_vocab_size,
        "hidden_size": backbone.d_output,
        # transformers looks at tied keys of any kind only where this is set.
        "tie_word_embeddings": True,
        "genossm_version": genossm.__version__,
        **label_keys(head),
    }


def _modeling(backbone: Backbone) -> str:
    from genossm.merged import merge

    config = type(backbone.config)
    wanted = [(config.__module__, config.__name__), ("genossm.nn.head", "HeadConfig")]
    wanted += [("genossm.nn.head", "SequenceHead"), ("genossm.models.classifier", "ends_before")]
    return _MODELING.replace("CONFIG_CLASS", config.__name__).replace("# MODULES", merge(wanted).rstrip())


_CONFIGURATION = '''"""The config of a genossm model."""

from transformers import PretrainedConfig


class GenossmConfig(PretrainedConfig):
    """What genossm calls the backbone's config, and the head's."""

    model_type = "genossm"

    def __init__(self, backbone=None, head=None, vocab_size=16, hidden_size=1, **options):
        self.backbone = backbone or {}
        self.head = head
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(**options)
'''

_MODELING = '''"""A genossm model for transformers: its modules, as genossm has them, and thin classes around them."""

from __future__ import annotations

from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput, SequenceClassifierOutput

from .configuration_genossm import GenossmConfig

# MODULES


def _build(config):
    """Return the backbone of a config; every buffer is part of its state, so that none is left without values."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.backbone.items()}
    backbone = CONFIG_CLASS.from_dict(values).build()
    for module in backbone.modules():
        module._non_persistent_buffers_set.clear()
    return backbone


def _tied(model):
    """Return the second names of parameters, each with the first one."""
    first, tied = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


class GenossmPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = GenossmConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = False

    def __init__(self, config):
        super().__init__(config)
        self.backbone = _build(config)
        self.add_parts(config)
        self._tied_weights_keys = _tied(self)
        self.post_init()

    def add_parts(self, config):
        """Add what stands on the backbone."""

    def _init_weights(self, module):
        """Leave weights as their own modules drew them."""

    def get_input_embeddings(self):
        return self.backbone.embedding

    def set_input_embeddings(self, value):
        self.backbone.embedding = value

    def lengths(self, attention_mask):
        """Return how many tokens of each row are real; they must stand on the left."""
        if attention_mask is None or bool(attention_mask.bool().all()):
            return None
        lengths = attention_mask.bool().sum(1)
        if not torch.equal(torch.arange(attention_mask.shape[1], device=lengths.device) < lengths[:, None],
                           attention_mask.bool()):
            raise ValueError("Padding must stand on the right: set tokenizer.padding_side = 'right'.")
        return lengths

    def states(self, input_ids, attention_mask):
        """Return the hidden states after the final norm."""
        return self.backbone(input_ids, self.lengths(attention_mask))


class GenossmModel(GenossmPreTrainedModel):
    """The backbone alone."""

    def forward(self, input_ids, attention_mask=None, return_dict=True, **unused):
        return BaseModelOutput(last_hidden_state=self.states(input_ids, attention_mask))


class GenossmForCausalLM(GenossmPreTrainedModel, GenerationMixin):
    """The next token."""

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=True, **unused):
        logits = self.backbone.logits(self.states(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        """Say that there is no cache of keys and values: each step reads the whole sequence."""
        return False

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class GenossmForMaskedLM(GenossmPreTrainedModel):
    """The tokens under the mask."""

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=True, **unused):
        logits = self.backbone.logits(self.states(input_ids, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class GenossmForSequenceClassification(GenossmPreTrainedModel):
    """One answer a sequence."""

    def add_parts(self, config):
        fallback = {"n_outputs": config.num_labels, "strands": 2 if getattr(self.backbone, "equivariant", False) else 1}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in (config.head or fallback).items()}
        self.head = SequenceHead(self.backbone.d_output, HeadConfig(**values))

    def _init_weights(self, module):
        """Draw what a file without a head lacks: transformers leaves its memory as it was found."""
        if isinstance(module, nn.Linear) and any(module is layer for layer in self.head.children()):
            self.head.draw(module)

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=True, **unused):
        lengths = self.lengths(attention_mask)
        x = self.backbone(input_ids, lengths)
        if self.head.config.pad_id is not None:
            lengths = ends_before(input_ids, self.head.config.pad_id)
        logits = self.head(x, lengths)
        loss = None
        if labels is not None and labels.is_floating_point():
            one = self.config.problem_type == "regression"
            mean_loss = F.mse_loss if one else F.binary_cross_entropy_with_logits
            loss = mean_loss(logits.squeeze(), labels.squeeze())
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

'''


def _tokenizer_config(backbone: Backbone) -> dict[str, Any]:
    from genossm.dna import tokenizer as shelf
    from genossm.inference import tokenizer_of

    tokenizer = tokenizer_of(backbone)
    kind, pattern = "bytes" if isinstance(tokenizer, shelf.ByteTokenizer) else "letters", ""
    if isinstance(tokenizer, shelf.KmerTokenizer):
        # transformers takes out the other words itself.
        kind, pattern = "pieces", "[ACGT]{6}|[ACGTN]"
    if isinstance(tokenizer, shelf.ProteinTokenizer):
        pattern = "|".join(re.escape(word) for word in tokenizer.vocabulary if len(word) == 1 or "null" in word)
    case = "upper" if getattr(tokenizer, "lower_case", "") == "upper" else "as it is"
    if isinstance(tokenizer, shelf.PlantCaduceusTokenizer):
        case = "lower"
    words = list(tokenizer.vocabulary)
    if kind == "bytes":
        words = [f"<{index}>" if index < 32 or index > 255 else chr(index) for index in range(512)]
    special = {"pad_token": words[tokenizer.pad_id]}
    if tokenizer.unknown_id >= 0:
        special |= {"unk_token": words[tokenizer.unknown_id], "mask_token": words[tokenizer.mask_id]}
    return {
        "tokenizer_class": "GenossmTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_genossm.GenossmTokenizer", None]},
        "kind": kind,
        "pattern": pattern,
        "case": case,
        "words": words,
        "before": list(tokenizer.before),
        "after": list(tokenizer.after),
        "padding_side": "right",
        "model_max_length": backbone.max_length or 1_000_000,
        **special,
    }


_TOKENIZATION = '''"""The tokenizer of a genossm model, one token a base, a k-mer or a byte."""

import re

from transformers import PreTrainedTokenizer


class GenossmTokenizer(PreTrainedTokenizer):
    """A list of words, what stands before and after a text, and how a text is cut."""

    vocab_files_names = {}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, words=(), kind="letters", case="upper", before=(), after=(), pattern="", **options):
        self.words = list(words)
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.kind, self.case, self.pattern = kind, case, pattern
        self.before, self.after = list(before), list(after)
        options.pop("add_special_tokens", None)
        options |= {"words": self.words, "kind": kind, "case": case, "pattern": pattern}
        super().__init__(before=self.before, after=self.after, **options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **unused):
        if self.kind == "bytes":
            return [self.words[byte] for byte in text.encode()]
        if self.kind == "pieces":
            pieces = re.split(f"({self.pattern})", text)
            return [token for piece in pieces for token in ([piece] if piece in self.ids else piece.split())]
        return list({"upper": text.upper(), "lower": text.lower()}.get(self.case, text))

    def _convert_token_to_id(self, token):
        unknown = self.ids.get(str(self.unk_token), 0)
        return self.ids.get(token, unknown)

    def _convert_id_to_token(self, index):
        return self.words[index] if index < len(self.words) else str(self.unk_token)

    def convert_tokens_to_string(self, tokens):
        return ("" if self.kind != "pieces" else " ").join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        ids = self.before + token_ids_0 + self.after
        return ids if token_ids_1 is None else ids + token_ids_1 + self.after

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        first = [1] * len(self.before) + [0] * len(token_ids_0) + [1] * len(self.after)
        return first if token_ids_1 is None else first + [0] * len(token_ids_1) + [1] * len(self.after)

    def num_special_tokens_to_add(self, pair=False):
        return len(self.before) + len(self.after) * (2 if pair else 1)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
'''


def _card(backbone: Backbone, classifier: Classifier | None, notes: dict[str, Any]) -> str:
    config, head = backbone.config, None if classifier is None else classifier.head.config
    task = "text-generation" if backbone.causal else "fill-mask"
    if head is not None:
        task = "text-classification"
    lines = _bullets(notes) or ["- not recorded"]
    shape = [f"| {key} | {value} |" for key, value in config.to_dict().items()]
    context = "any" if backbone.max_length is None else f"{backbone.max_length:,} tokens"
    return "\n".join(
        [
            *("---", "license: apache-2.0", "library_name: transformers", f"pipeline_tag: {task}"),
            *("tags:", "- dna", "- genomics", f"- {config.model_type}", "---", ""),
            f"# {config.model_type}, {backbone.num_parameters():,} parameters",
            *("", f"Written by genossm {genossm.__version__}. Context: {context}. Tokenizer: {config.tokenizer}.", ""),
            "Open it with `trust_remote_code=True`; the code in this folder needs torch alone.",
            *("", "## Training data and metrics", "", *lines),
            *("", "## Config", "", "| value | |", "|---|---|", *shape, ""),
        ]
    )


def _bullets(notes: dict[str, Any], indent: str = "") -> list[str]:
    """Return notes as a list, what is nested below what it belongs to."""
    lines: list[str] = []
    for key, value in notes.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {key}:", *_bullets(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}- {key}: {value}")
    return lines
