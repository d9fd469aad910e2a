"""Every published tokenizer, over the official ids of every kind of text."""

import json
from pathlib import Path

import numpy as np
import pytest

from genossm.dna import tokenizer as shelf
from genossm.dna.alphabet import ENCODE

OFFICIAL = json.loads((Path(__file__).parent.parent / "data" / "parity" / "tokenizers.json").read_text())
BUILD = {
    "caduceus": shelf.CharTokenizer,
    "hyenadna_hf": shelf.HyenaDNATokenizer,
    "hyenadna_train_repo": shelf.HyenaDNATokenizer,
    "hyenadna_standalone": shelf.HyenaDNAStandaloneTokenizer,
    "caduceus_train_repo": shelf.HyenaDNAStandaloneTokenizer,
    "nt_v1_hf_esmtokenizer": shelf.KmerTokenizer,
    "nt_v2_hf_esmtokenizer": shelf.KmerTokenizerV2,
    "nt_v1_jax": lambda: shelf.KmerTokenizer(strict=True),
    "nt_v2_jax": lambda: shelf.KmerTokenizerV2(strict=True),
    "evo_charlevel": shelf.ByteTokenizer,
}
NAMES = sorted(BUILD)
PADDED = [name for name in NAMES if "pad_longest_left" in OFFICIAL[name]]


@pytest.mark.parametrize("name", NAMES)
def test_every_text_has_the_official_ids(name):
    ours, official = BUILD[name](), OFFICIAL[name]
    for special, key in ((name != "evo_charlevel", "encode"), (False, "encode_no_special")):
        for text, expected in official.get(key, {}).items():
            if isinstance(expected, dict) and "error" in expected:
                with pytest.raises(KeyError):
                    ours.encode(text, special=special)
            else:
                expected = expected["input_ids"] if isinstance(expected, dict) else expected
                assert ours.encode(text, special=special).tolist() == expected, text


@pytest.mark.parametrize("name", NAMES)
def test_decoding(name):
    ours, official = BUILD[name](), OFFICIAL[name]
    for key, special in (("decode", True), ("decode_skip_special", False)):
        for ids, text in official.get(key, {}).items():
            assert ours.decode(json.loads(ids), special=special) == text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_and_truncation(name, side):
    ours, official, texts = BUILD[name](), OFFICIAL[name], OFFICIAL["_batch"]
    for key, options in (
        (f"pad_longest_{side}", {}),
        (f"pad_max_length12_trunc_{side}", {"max_length": 12, "pad_to": 12}),
    ):
        ids, mask = ours.encode_batch(texts, side=side, **options)
        assert ids.tolist() == official[key]["input_ids"]
        assert mask.astype(int).tolist() == official[key]["attention_mask"]
    for special, key in ((True, f"trunc4_{side}"), (False, f"trunc4_no_special_{side}")):
        ids, mask = ours.encode_batch(texts, special=special, max_length=4, side=side)
        assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == official[key]


@pytest.mark.parametrize("name", PADDED)
def test_two_texts(name):
    expected = OFFICIAL[name]["pair"]
    if isinstance(expected, dict):
        with pytest.raises(ValueError, match="takes one text"):
            BUILD[name]().encode_pair("ACGT", "TTN")
    else:
        assert BUILD[name]().encode_pair("ACGT", "TTN").tolist() == expected


def test_evo_batches():
    texts = OFFICIAL["_batch"]
    for special, key in ((True, "prepare_batch_bos"), (False, "prepare_batch_nobos")):
        assert shelf.ByteTokenizer().encode_batch(texts, special=special)[0].tolist() == OFFICIAL["evo_charlevel"][key]


@pytest.mark.parametrize("name", ["nt_v1_jax", "nt_v2_jax"])
def test_kmers_stand_where_they_were_published(name):
    ours, anchors = BUILD[name](), OFFICIAL[name]["anchors"]
    assert {token: ours.vocabulary.index(token) for token in anchors} == anchors


@pytest.mark.parametrize("build", [*BUILD.values(), shelf.PlantCaduceusTokenizer])
def test_stored_bases_have_the_ids_of_their_upper_case_letters(build):
    ours, text = build(), "ACGTNNACGTACGTTTN"
    codes = np.frombuffer(text.encode().translate(ENCODE), dtype=np.uint8)
    assert ours.from_codes(codes).tolist() == ours.encode(text).tolist()


def test_proteins_are_read_as_the_tokenizer_of_esm_reads_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = shelf.tokenizer_named("esm2")
    (tmp_path / "vocab.txt").write_text("\n".join(ours.vocabulary))
    theirs = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    assert len(ours.vocabulary) == 33
    for text in ("MKTAYIAK", "acgtMK", "MK<mask>A", "M K\tL", "", "X.-*BZ", "<null_1>A", "MKJJJ1A", "<pad>M<cls>"):
        ids = ours.encode(text, special=True).tolist()
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.encode_pair("MK", "AL").tolist() == theirs("MK", "AL")["input_ids"]
    with pytest.raises(ValueError, match="reads proteins"):
        ours.from_codes(np.array([7, 8], dtype=np.uint8))
