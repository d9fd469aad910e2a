"""Heads: pooling never looks at padding; the published decoder does what its code does."""

import json

import pytest
import torch

from genossm.nn.head import POOLINGS, POSITIONAL, HeadConfig, SequenceHead, pool


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


@pytest.mark.parametrize("mode", POSITIONAL)
def test_several_positions_are_answered_from_the_real_end(mode):
    x, lengths = torch.randn(2, 6, 4), torch.tensor([5, 3])
    of = {"mean": lambda v: v.mean(0), "sum": lambda v: v.sum(0), "last": lambda v: v[-1], "first": lambda v: v[-1]}[
        mode
    ]
    for given in (None, lengths):
        head = SequenceHead(4, HeadConfig(n_outputs=2, pooling=mode, positions=2))
        ends = [6, 6] if given is None else given.tolist()
        stops = [(1, 2) if mode == "first" else (end - 1, end) for end in ends]
        rows = [torch.stack([of(row[:stop]) for stop in pair]) for row, pair in zip(x, stops, strict=True)]
        torch.testing.assert_close(head(x, given), head.out(torch.stack(rows)))
    every = SequenceHead(4, HeadConfig(n_outputs=2, pooling=mode, positions=None))
    expected = torch.stack([of(x[0, : stop + 1]) for stop in range(6)])
    torch.testing.assert_close(every(x)[0], every.out(expected))
    with pytest.raises(ValueError, match="answers 4 positions of a row; the shortest row has 3"):
        SequenceHead(4, HeadConfig(n_outputs=2, pooling=mode, positions=4))(x, lengths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_outputs": 0}, "at least 1"),
        ({"n_outputs": 2, "pooling": "median"}, "one of mean"),
        ({"n_outputs": 2, "strands": 3}, "1 or 2"),
        ({"n_outputs": 2, "pooling": "max", "positions": 2}, "unless pooling is one of mean"),
        ({"n_outputs": 2, "positions": -1}, "at least 0"),
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
