"""What every data set of the shelf promises. A new one is found by its file and asked the same."""

import importlib
import inspect
import itertools
import pickle
import pkgutil
from dataclasses import asdict

import numpy as np
import pytest
import torch

import genossm.data
from genossm.data.base import SPLITS
from genossm.data.datamodule import BUNDLED, GenomeWindows, bundled
from genossm.data.examples import LabelledData
from genossm.data.sequences import Sequences
from genossm.data.transforms import IGNORED, MaskTokens, NextToken
from genossm.dna import alphabet
from genossm.dna.interval import first_overlap


def labelled() -> list[type[LabelledData]]:
    found = set()
    for module in pkgutil.iter_modules(genossm.data.__path__):
        for value in vars(importlib.import_module(f"genossm.data.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, LabelledData) and not inspect.isabstract(value):
                found.add(value)
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.fixture(params=labelled(), ids=lambda kind: kind.__name__)
def dataset(request, tmp_path):
    return request.param.tiny(tmp_path / "tiny")


def test_has_three_splits_with_no_example_in_common(dataset):
    splits = dataset.load().splits
    assert set(splits) == set(SPLITS)
    # A validation split that was not published is made by the protocol of a run, out of train.
    assert splits["train"]
    assert splits["test"]
    for one, other in itertools.combinations(splits.values(), 2):
        assert not {(e.sequence, e.name) for e in one} & {(e.sequence, e.name) for e in other}
        assert first_overlap(*([e.interval for e in rows if e.interval] for rows in (one, other))) is None


def test_targets_are_what_the_data_set_says(dataset):
    data = dataset.load()
    target, names = data.target, data.target.names
    for example in (example for rows in data.splits.values() for example in rows):
        value = np.asarray(example.target)
        if target.along:
            assert value.shape[0] * target.bin == len(example.sequence)
        elif target.chooses:
            assert value.shape == ()
            assert 0 <= value < len(names)
        else:
            assert value.shape == (len(names),)
            assert np.isfinite(value).all()
            assert target.kind != "multilabel" or set(value.tolist()) <= {0.0, 1.0}


def test_opens_the_same_every_time(dataset):
    first, second = dataset.load(), dataset.load()
    assert first.target == second.target
    for split in SPLITS:
        for one, other in zip(first.splits[split], second.splits[split], strict=True):
            assert one.sequence == other.sequence
            np.testing.assert_array_equal(one.target, other.target)


def test_is_plain_values(dataset):
    assert type(dataset)(**asdict(dataset)) == dataset


def test_batches_travel_into_workers(dataset):
    data = dataset.load()
    module = Sequences(data.splits, data.target, batch_size=4, batches=5, reverse_complement=True)
    batches = module.train_dataloader().dataset
    there = pickle.loads(pickle.dumps(batches))
    for number in (4, 0):
        ours, theirs = batches[number], there[number]
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key].nan_to_num(), theirs[key].nan_to_num()) for key in ours)


OBJECTIVES = {"causal": NextToken(), "masked": MaskTokens()}


@pytest.fixture(params=OBJECTIVES)
def windows(request, tmp_path):
    module = GenomeWindows(
        fasta=str(bundled("fa.gz").with_name("lambda_NC_001416.fa.gz")),
        length=128,
        batch_size=4,
        batches=6,
        objective=OBJECTIVES[request.param],
        cache=str(tmp_path),
    )
    module.setup()
    return module


def test_windows_of_the_splits_share_no_base(windows):
    splits = windows.splits
    assert all(splits.values())
    for one, other in itertools.combinations(splits.values(), 2):
        assert first_overlap(one, other) is None
    for interval in (interval for intervals in splits.values() for interval in intervals):
        assert interval.end <= windows.genome.contigs[interval.chrom]


def test_window_batches_are_bytes_of_the_published_ids(windows):
    for batch in windows.train_dataloader():
        assert batch["ids_BL"].shape == batch["targets"].shape == (4, 128)
        assert batch["ids_BL"].dtype == batch["targets"].dtype == torch.uint8
        counted = batch["targets"][batch["targets"] != IGNORED]
        assert len(counted)
        assert counted.min() >= alphabet.A
        assert counted.max() <= alphabet.T


def test_window_batches_are_a_function_of_their_number(windows):
    batches = windows.train_dataloader().dataset
    there = pickle.loads(pickle.dumps(batches))
    for number in (5, 0, 5):
        assert torch.equal(batches[number]["ids_BL"], there[number]["ids_BL"])
        assert torch.equal(batches[number]["targets"], there[number]["targets"])
    assert not torch.equal(batches[0]["ids_BL"], batches[1]["ids_BL"])


def test_windows_continue_where_they_were_saved(windows):
    whole = list(windows.train_dataloader())
    loader = windows.train_dataloader()
    running = iter(loader)
    for _ in range(2):
        next(running)
    again = windows.train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 4
    assert all(torch.equal(one["ids_BL"], other["ids_BL"]) for one, other in zip(whole[2:], rest, strict=True))


def test_two_workers_give_what_none_gives():
    def ids(workers):
        module = GenomeWindows(fasta=BUNDLED, length=64, batch_size=2, batches=5, num_workers=workers)
        module.setup()
        return torch.stack([batch["ids_BL"] for batch in module.train_dataloader()])

    assert torch.equal(ids(0), ids(2))
