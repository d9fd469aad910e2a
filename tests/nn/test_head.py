"""Heads: pooling never looks at padding; the published decoder does what its code does."""

import json

import pytest
import torch

from genossm.nn.head import DECODER_MODES, POOLINGS, HeadConfig, SequenceDecoder, SequenceHead, pool


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_never_looks_at_padding(mode):
    x, lengths = torch.randn(3, 9, 4), torch.tensor([9, 4, 1])
    together = pool(x, mode, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row], pool(x[row : row + 1, :length], mode)[0])


@pytest.mark.parametrize("mode", POOLINGS)
def test_two_strands_give_one_answer_whichever_is_read(mode):
    x = torch.randn(2, 7, 8)
    head = SequenceHead(8, HeadConfig(n_outputs=3, pooling=mode, strands=2))
    torch.testing.assert_close(head(x), head(x.flip(1, 2)))


def test_hidden_layer_and_bias_are_what_the_config_says():
    head = SequenceHead(8, HeadConfig(n_outputs=3, hidden=True, bias=False, pooling="first"))
    assert sorted(head.state_dict()) == ["dense.bias", "dense.weight", "out.weight"]
    x = torch.randn(2, 5, 8)
    expected = torch.tanh(x[:, 0] @ head.dense.weight.T + head.dense.bias) @ head.out.weight.T
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("mode", DECODER_MODES)
def test_decoder_modes(mode):
    x, lengths = torch.randn(2, 6, 4), torch.tensor([5, 3])
    decoder = SequenceDecoder(4, 2, mode, positions=None if mode == "ragged" else 0)
    weight, bias = decoder.output_transform.weight, decoder.output_transform.bias
    expected = {
        "last": x[:, -1],
        "first": x[:, 0],
        "pool": x.mean(1),
        "sum": x.sum(1),
        "ragged": x[:, :5],
    }[mode]
    torch.testing.assert_close(decoder(x, lengths), expected @ weight.T + bias)


def test_decoder_answers_the_last_positions_with_running_means():
    x = torch.randn(1, 6, 4)
    decoder = SequenceDecoder(4, 2, "pool", positions=2)
    expected = decoder.output_transform(torch.stack([x[:, :5].mean(1), x.mean(1)], 1))
    torch.testing.assert_close(decoder(x), expected)


def test_decoder_looks_at_real_positions_where_told():
    x, lengths = torch.randn(2, 6, 4), torch.tensor([5, 3])
    decoder = SequenceDecoder(4, 2, "sum", use_lengths=True)
    expected = decoder.output_transform(torch.stack([x[0, :5].sum(0), x[1, :3].sum(0)]))
    torch.testing.assert_close(decoder(x, lengths), expected)
    masked = SequenceDecoder(4, 2, "pool")
    mask = torch.arange(6) < lengths[:, None]
    expected = masked.output_transform(torch.stack([x[0, :5].mean(0), x[1, :3].mean(0)]))
    torch.testing.assert_close(masked(x, mask_BL=mask), expected)
    with pytest.raises(ValueError, match="needs the lengths"):
        decoder(x)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_outputs": 0}, "at least 1"),
        ({"n_outputs": 2, "pooling": "median"}, "one of mean"),
        ({"n_outputs": 2, "strands": 3}, "1 or 2"),
    ],
)
def test_impossible_heads_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**values)


def test_center_is_its_own_mirror_image_and_sees_no_padding():
    x = torch.randn(2, 12, 3)
    lengths = torch.tensor([12, 7])
    pooled = pool(x, "center", lengths)
    torch.testing.assert_close(pooled[0], x[0, 2:10].mean(0))
    torch.testing.assert_close(pooled[1], x[1, :7].mean(0))
    torch.testing.assert_close(pool(x[:1].flip(1), "center"), pooled[:1])


def test_attention_ignores_padding():
    head = SequenceHead(3, HeadConfig(n_outputs=2, pooling="attention")).eval()
    x = torch.randn(2, 12, 3)
    lengths = torch.tensor([12, 7])
    changed = x.clone()
    changed[1, 7:] = 1e3
    torch.testing.assert_close(head(changed, lengths), head(x, lengths))
    torch.testing.assert_close(head(x[1:, :7]), head(x, lengths)[1:])


def test_answers_along_the_sequence_and_in_bins():
    x = torch.randn(2, 12, 3)
    assert SequenceHead(3, HeadConfig(n_outputs=2, pooling="none"))(x).shape == (2, 12, 2)
    binned = SequenceHead(3, HeadConfig(n_outputs=2, pooling="none", bin=4))
    torch.testing.assert_close(binned(x)[:, 0], binned.answer(x[:, :4].mean(1)))


def test_config_survives_the_file():
    config = HeadConfig(n_outputs=2, names=("a", "b"), kind="binary", pooling="attention")
    assert HeadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="A head has no width"):
        HeadConfig.from_dict({"width": 3})
    with pytest.raises(ValueError, match="can't have 3 names"):
        HeadConfig(n_outputs=2, names=("a", "b", "c"))
