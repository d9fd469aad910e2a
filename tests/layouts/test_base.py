"""Every layout: what a file lacks, or has too many, or in another shape, is named; nothing is dropped in silence."""

import copy
import re
from pathlib import Path

import pytest
import torch

from genossm import published, source
from genossm.layouts.base import PublishedConfig
from genossm.models.caduceus import CaduceusConfig
from genossm.models.classifier import Classifier
from genossm.models.hyenadna import HyenaDNAConfig
from genossm.models.nucleotide_transformer import NucleotideTransformerConfig
from genossm.nn.head import HeadConfig
from layouts.written import InMemory

PARITY = Path(__file__).parent.parent / "data" / "parity"
CASES = ["caduceus-ps-seqcls", "hyenadna-ckpt-head-pool", "hyenadna-hf-tiny", "mamba-hf-tiny", "mamba2-ssm-tiny"]
CASES += ["nt-v2-tiny", "stripedhyena-evo1-tiny"]
DISPENSABLE = re.compile(
    # Nothing reads these, or they can be computed, and not every release of the official code writes them.
    r"esm\.contact_head.*|esm\.embeddings\.position_embeddings.*|.*attention\.self\.rotary_embeddings\.inv_freq"
    # Second names of one tensor, of which any will do.
    r"|lm_head\.weight|backbone\.embedding\.weight|.*implicit_filter\.\d\.freq"
)
# Of learning, kernels, limits and where the file came from.
SAYS_NOTHING = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_cfg",
        "auto_map",
        "bos_token_id",
        "checkpoint_mixer",
        "checkpoint_mlp",
        "chunk_size",
        "column_split",
        "d_inner",
        "eos_token_id",
        "esmfold_config",
        "fused_add_norm",
        "fused_dropout_add_ln",
        "fused_mlp",
        "hyena_filter_dropout",
        "inference_mode",
        "initializer_cfg",
        "initializer_range",
        "label2id",
        "local_order",
        "log_intermediate_values",
        "lr",
        "make_vocab_size_divisible_by",
        "max_seqlen",
        "model_parallel_size",
        "model_type",
        "num_filters",
        "pad_token_id",
        "pipe_parallel_size",
        "prefill_style",
        "problem_type",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "return_hidden_state",
        "split_k0",
        "time_step_init_scheme",
        "time_step_scale",
        "torch_dtype",
        "transformers_version",
        "use_bias",
        "use_cache",
        "use_fast_path",
        "use_flash_attn",
        "use_flash_depthwise",
        "use_flash_rmsnorm",
        "use_flashfft",
        "use_mambapy",
        "vocab_list",
        "wd",
    ]
)


def opened(case):
    files = source.find(PARITY / case)
    return files.read_config(), files.read_tensors()


def refusal(config, tensors):
    """Return what is said of a file, or an empty string where it is read."""
    try:
        published.read(InMemory(config, tensors))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_that_is_gone_misshapen_or_of_another_type_is_named(case):
    config, tensors = opened(case)
    kinds = {re.sub(r"\d+", "#", name): name for name in reversed(tensors)}
    for name in kinds.values():
        gone = refusal(config, {n: t for n, t in tensors.items() if n != name})
        assert name in gone or (gone == "" and DISPENSABLE.fullmatch(name)), f"without {name}: {gone}"
        tensor = tensors[name]
        larger = torch.zeros([size + 1 for size in tensor.shape], dtype=tensor.dtype)
        said = refusal(config, {**tensors, name: larger})
        assert name.rpartition(".")[0].removeprefix("caduceus.") in said, said
        if tensor.is_floating_point() and tensor.ndim > 2:
            assert name in refusal(config, {**tensors, name: tensor.long()}), name
    assert "surprise is unknown" in refusal(config, {**tensors, "surprise": torch.zeros(1)})


def keys_of(config, path=()):
    for key, value in config.items():
        yield (*path, key), value
        if isinstance(value, dict) and key in ("layer", "ssm_cfg", "attn_cfg"):
            yield from keys_of(value, (*path, key))


@pytest.mark.parametrize("case", CASES)
def test_each_config_value_that_means_nothing_is_named(case):
    config, tensors = opened(case)
    for path, old in keys_of(config):
        if path[-1] in SAYS_NOTHING:
            continue
        numeric = (
            isinstance(old, int | float) and not isinstance(old, bool) and path[-1] not in ("activation_freq", "w")
        )
        for new in ({"a": 1}, -7) if numeric else ({"a": 1},):
            changed = copy.deepcopy(config)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = new
            said = refusal(changed, tensors)
            assert re.search(rf"\b{path[-1]}\b|fit its config", said), f"{'.'.join(path)}: {old} -> {new}: {said!r}"
    assert "unknown keys: surprise" in refusal({**config, "surprise": 1}, tensors)


def test_numbers_that_json_lacks_are_read():
    config = PublishedConfig({"limits": [0.0, {"__float__": "Infinity"}], "other": {"__float__": 3}}, "a file")
    assert config.take("limits") == [0.0, float("inf")]
    assert config.take("other") == {"__float__": 3}


def test_names_of_labels_are_kept_in_the_order_of_their_ids():
    named = PublishedConfig(
        {"id2label": {"1": "b", "0": "a", "10": "k", **{str(i): "x" for i in range(2, 10)}}}, "a file"
    )
    assert named.labels[:2] == ("a", "b")
    assert named.labels[10] == "k"
    with pytest.raises(ValueError, match="id2label must be a name for each id"):
        PublishedConfig({"id2label": {"0": "a", "2": "b"}}, "a file").labels  # noqa: B018


HEADS = [
    ("hyenadna-hf", HyenaDNAConfig(d_model=8, n_layer=1), {"pooling": "mean", "bias": False}, "pooling='last'"),
    ("hyenadna-hf", HyenaDNAConfig(d_model=8, n_layer=1), {"pooling": "last"}, "bias=False"),
    ("hyenadna", HyenaDNAConfig(d_model=8, n_layer=1), {"pooling": "max"}, "'max'"),
    ("caduceus-ph", CaduceusConfig(d_model=8, n_layer=1), {"pooling": "center", "bias": False}, "'center'"),
    ("caduceus-ps", CaduceusConfig(d_model=8, n_layer=1, rcps=True), {"bias": False}, "strands=2"),
    ("esm", NucleotideTransformerConfig(d_model=8, n_layer=1, n_head=2, d_inner=8), {"pooling": "mean"}, "'first'"),
    ("esm", NucleotideTransformerConfig(d_model=8, n_layer=1, n_head=2, d_inner=8), {"pooling": "first"}, "hidden"),
]


@pytest.mark.parametrize(("layout", "shape", "head", "message"), HEADS)
def test_a_head_that_a_layout_cannot_write_is_refused(layout, shape, head, message):
    with pytest.raises(ValueError, match=f"The head of this layout has .*{re.escape(message)}"):
        published.write(Classifier(shape.build(), HeadConfig(n_outputs=2, **head)), layout)
