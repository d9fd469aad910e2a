"""Batches of labelled sequences: a pure function of their number, padded on the right, every row once."""

import numpy as np
import pytest
import torch

from genossm.data.examples import Example, Labelled, Target
from genossm.data.protocols import divide
from genossm.data.sequences import Encoded, SequenceBatches, Sequences
from genossm.data.transforms import IGNORED
from genossm.dna import alphabet
from genossm.dna.interval import Interval
from genossm.dna.tokenizer import CharTokenizer

BINARY = Target(kind="binary", names=("a", "b"))


def draw_rows(count=50, seed=0, contigs=1):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        sequence = "".join(rng.choice(list("ACGT"), size=int(rng.integers(5, 40))))
        where = Interval(f"chr{i % contigs}", 100 * i, 100 * i + len(sequence))
        rows.append(Example(sequence, i % 2, where))
    return rows


def test_each_pass_shows_every_row_once_and_numbers_repeat():
    rows = draw_rows(48)
    batches = SequenceBatches(Encoded(rows, BINARY), CharTokenizer(), 8, seed=3, reverse_complement=True)
    seen = [np.sort(np.concatenate([batches.numbers(p * 6 + i) for i in range(6)])) for p in range(2)]
    np.testing.assert_array_equal(seen, [np.arange(48)] * 2)
    again = SequenceBatches(Encoded(rows, BINARY), CharTokenizer(), 8, seed=3, reverse_complement=True)
    for number in (11, 4):
        first, second = batches[number], again[number]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_mutation_exchanges_a_share_of_the_training_bases_alone():
    rows = [Example("A" * 400 + "N" * 40, i % 2) for i in range(32)]
    splits = {"train": rows, "val": rows, "test": rows}
    data = Sequences(splits, BINARY, batch_size=32, batches=2, mutate=0.2, seed=5)
    plain = Encoded(rows, BINARY)
    ids_BL = data.of("train")[0]["ids_BL"]
    assert torch.equal(ids_BL, data.of("train")[0]["ids_BL"])
    assert not torch.equal(ids_BL, data.of("train")[1]["ids_BL"])
    # A quarter of those drawn are the base that stood there.
    assert (ids_BL[:, :400] != alphabet.A).float().mean() == pytest.approx(0.15, abs=0.01)
    assert (ids_BL[:, 400:] == alphabet.N).all()
    assert (data.of("val")[0]["ids_BL"][0] == torch.from_numpy(plain.row(0).copy())).all()
    with pytest.raises(ValueError, match=r"loader.mutate must be in \[0, 1\)"):
        Sequences(splits, BINARY, mutate=1.0)


def test_processes_share_a_global_batch():
    rows = Encoded(draw_rows(48), BINARY)
    whole = SequenceBatches(rows, CharTokenizer(), 8, seed=1)
    parts = [SequenceBatches(rows, CharTokenizer(), 4, seed=1, rank=r, world=2) for r in range(2)]
    for number in range(9):
        joined = np.sort(np.concatenate([p.numbers(number) for p in parts]))
        np.testing.assert_array_equal(joined, np.sort(whole.numbers(number)))


def test_padding_stands_on_the_right_and_buckets_keep_it_small():
    rows = draw_rows(64)
    batch = SequenceBatches(Encoded(rows, BINARY), CharTokenizer(), 8, seed=None)[2]
    for ids, length in zip(batch["ids_BL"], batch["lengths_B"], strict=True):
        assert bool((ids[:length] != alphabet.PAD).all())
        assert bool((ids[length:] == alphabet.PAD).all())
    drawn = SequenceBatches(Encoded(draw_rows(640), BINARY), CharTokenizer(), 8, seed=0)
    ids = [drawn[i]["ids_BL"] for i in range(80)]
    assert sum(int((x == alphabet.PAD).sum()) for x in ids) < 0.1 * sum(x.numel() for x in ids)


def test_reverse_complement_turns_sequence_and_labels_along_it():
    target = Target(kind="per_base", names=("x", "y"))
    rows = [Example("AACGT"[: 3 + i % 3], np.array([0, 0, 1, 1, 1][: 3 + i % 3], np.uint8)) for i in range(32)]
    batch = SequenceBatches(Encoded(rows, target), CharTokenizer(), 32, seed=0, reverse_complement=True)[0]
    flipped = 0
    for ids, labels, length in zip(batch["ids_BL"], batch["targets"], batch["lengths_B"], strict=True):
        text = CharTokenizer().decode(ids[:length].tolist())
        forward = "AACGT"[:length]
        truth = [0, 0, 1, 1, 1][:length]
        flipped += text != forward
        assert (text, labels[:length].tolist()) in (
            (forward, truth),
            (alphabet.reverse_complement_text(forward), truth[::-1]),
        )
        assert bool((labels[length:] == IGNORED).all())
    assert 0 < flipped < 32


def test_long_sequences_are_an_error_unless_cropped():
    rows = [Example("AAACCCGGG", 0), Example("ACG", 1)]
    with pytest.raises(ValueError, match=r"Row 0 has 9 bp; the model takes at most 5"):
        Encoded(rows, BINARY, longest=5)
    assert alphabet.to_text(Encoded(rows, BINARY, 5, "center").row(0)) == "ACCCG"
    assert alphabet.to_text(Encoded(rows, BINARY, 5, "start").row(0)) == "AAACC"
    with pytest.raises(ValueError, match="crop must be"):
        Encoded(rows, BINARY, 5, "end")
    with pytest.raises(ValueError, match="is no nucleotide"):
        Encoded([Example("ACX!", 0)], BINARY)


def test_data_module_serves_the_run():
    splits = {"train": draw_rows(20), "val": draw_rows(7, 1), "test": draw_rows(5, 2)}
    module = Sequences(splits, BINARY, batch_size=4, batches=11)
    assert len(list(module.train_dataloader())) == 11
    assert sum(len(batch["targets"]) for batch in module.val_dataloader()) == 7


def dataset(**splits):
    return Labelled(target=BINARY, splits=splits, title="t")


def test_protocols_hold_out_what_they_say():
    train, test = draw_rows(100, contigs=10), draw_rows(20, 1, contigs=10)
    data = dataset(train=train, test=test)
    honest, name = divide(data, seed=1)
    assert name == "caduceus_cv"
    assert len(honest["val"]) == 10
    assert honest["test"] == test
    assert {id(e) for e in honest["train"]} | {id(e) for e in honest["val"]} == {id(e) for e in train}
    assert divide(data, "caduceus_cv", 2)[0]["val"] != honest["val"]
    assert divide(data, "hyenadna")[0]["val"] == test
    folds = [divide(data, "nt_kfold", k)[0]["val"] for k in range(10)]
    assert sorted(id(e) for fold in folds for e in fold) == sorted(id(e) for e in train)
    held = divide(data, "chrom_holdout", val_contigs=["chr2"], test_contigs=["chr3"])[0]
    assert {e.interval.chrom for e in held["test"]} == {"chr3"}
    assert {e.interval.chrom for e in held["val"]} == {"chr2"}
    assert not {"chr2", "chr3"} & {e.interval.chrom for e in held["train"]}


def test_protocols_refuse_what_they_cannot_do():
    data = dataset(train=draw_rows(10), test=[])
    with pytest.raises(ValueError, match="protocol must be auto or one of given"):
        divide(data, "cv")
    with pytest.raises(ValueError, match="needs at least 3"):
        divide(data, "chrom_holdout")
    with pytest.raises(ValueError, match="no val split"):
        divide(data, "given")
    with pytest.raises(ValueError, match="no rows on chr9"):
        divide(dataset(train=draw_rows(30, contigs=4)), "chrom_holdout", val_contigs=["chr9"])
