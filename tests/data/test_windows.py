import multiprocessing
import threading

import numpy as np
import pytest
import torch

from genossm.data.base import RunLoader
from genossm.data.datamodule import GenomeWindows
from genossm.data.transforms import IGNORED, MaskTokens, NextToken
from genossm.data.windows import WindowBatches, fit_windows, split_genome
from genossm.dna import alphabet
from genossm.dna.genome import Genome
from genossm.dna.interval import Interval


def batches(genome, objective=None, intervals=None, **options):
    whole = [Interval(name, 0, length) for name, length in genome.contigs.items()]
    return WindowBatches(genome=genome, intervals=intervals or whole, objective=objective or NextToken(), **options)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A genome in which every place can be told: each 8-mer of contig "one" is the number of its place in base 4."""
    text = "".join("ACGT"[(place >> 2 * digit) & 3] for place in range(512) for digit in range(8))
    path = tmp_path_factory.mktemp("numbered") / "a.fa"
    path.write_text(f">one\n{text}\n>two\n{text[::-1]}\n")
    return Genome(path)


def starts_of(windows, number, rows, length):
    ids_BL = windows.drawn(number, range(rows), rows, length)["ids_BL"].numpy()
    text = {name: alphabet.to_text(windows.genome.codes(name)) for name in windows.genome.contigs}
    found = []
    for ids_L in ids_BL:
        places = [(name, text[name].find(alphabet.to_text(ids_L))) for name in text]
        found.append(next(place for place in places if place[1] >= 0))
    return found


def test_tiles_are_each_taken_once_a_pass_in_another_order(numbered):
    windows = batches(numbered, sampling="tile", reverse_complement=False)
    passes = [[s for n in range(p * 7, p * 7 + 7) for s in starts_of(windows, n, 16, 64)] for p in range(2)]
    expected = sorted((name, start) for name in ("one", "two") for start in range(0, 4096 - 64, 64))
    assert len(set(passes[0])) == len(passes[0]) > 100
    assert set(passes[0]) <= set(expected)
    assert passes[0] != passes[1]


def test_legacy_windows_begin_where_the_intervals_do(numbered):
    intervals = [Interval("one", 0, 500), Interval("one", 500, 900), Interval("two", 40, 1000)]
    windows = batches(numbered, intervals=intervals, sampling="hyenadna_legacy", reverse_complement=False)
    assert set(starts_of(windows, 0, 3, 64)) == {("one", 0), ("one", 500), ("two", 40)}


def test_shifted_tiles_stay_in_their_interval(numbered):
    intervals = [Interval("one", 100, 300)]
    windows = batches(numbered, intervals=intervals, sampling="tile", shift=50, reverse_complement=False)
    starts = [start for number in range(40) for _, start in starts_of(windows, number, 2, 64)]
    assert min(starts) >= 100
    assert max(starts) + 65 <= 300
    assert len(set(starts)) > 10


@pytest.mark.parametrize("objective", [NextToken(), MaskTokens()], ids=lambda o: type(o).__name__)
def test_a_row_does_not_depend_on_who_has_it(chr20, objective):
    windows = batches(chr20, objective)
    whole = windows.drawn(5, range(6), 6, 100)
    parts = [windows.drawn(5, range(first, first + 2), 6, 100) for first in (0, 2, 4)]
    for name in ("ids_BL", "targets"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("length", [31, 9000])
def test_batches_are_what_the_drawn_numbers_say(tmp_path, length):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGTacgtN", np.uint8)
    paths = [tmp_path / "a.fa", tmp_path / "b.fa"]
    for path in paths:
        texts = (letters[rng.integers(0, 9, size)].tobytes().decode() for size in (20_000, 11_000))
        path.write_text("".join(f">{path.stem}{i}\n{text}\n" for i, text in enumerate(texts)))
    genome = Genome(paths)
    windows = batches(genome, seed=5)
    found = windows.drawn(7, range(1, 6), 8, length)
    room = [size - length for size in genome.contigs.values()]
    rng = np.random.default_rng([5, 7])
    places, turned = rng.integers(sum(room), size=8), rng.random(8) < 0.5
    for row, ids_L in enumerate(found["ids_BL"].numpy(), start=1):
        contig = int(np.searchsorted(np.cumsum(room), places[row], side="right"))
        start = int(places[row]) - sum(room[:contig])
        interval = Interval(list(genome.contigs)[contig], start, start + length + 1, "-" if turned[row] else "+")
        assert np.array_equal(ids_L, genome.fetch(interval)[:-1] & 0x7F)


def test_next_token_leaves_its_input_alone():
    ids_BL = np.array([[7, 8, 11, 6, 10, 4]], np.uint8)
    inputs_BL, targets_BL = NextToken()(ids_BL, np.random.default_rng(0))
    assert inputs_BL.tolist() == [[7, 8, 11, 6, 10]]
    assert targets_BL.tolist() == [[8, IGNORED, IGNORED, 10, IGNORED]]


def test_windows_of_n_are_drawn_again(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">one\n" + "N" * 800 + "ACGT" * 50 + "\n")
    windows = batches(Genome(path), max_n=0.2)
    for number in range(20):
        ids_BL = windows.drawn(number, range(4), 4, 50)["ids_BL"]
        assert int((ids_BL == alphabet.N).sum(1).max()) <= 11


def test_soft_masked_bases_weigh_less(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">one\n" + "ACGTacgtac" * 20 + "\n")
    windows = batches(Genome(path), soft_mask_weight=0.1, reverse_complement=False)
    batch = windows.tiled([Interval("one", 0, 11)])
    assert batch["weights_BL"].tolist() == pytest.approx(torch.tensor([[1.0, 1, 1, *[0.1] * 6, 1]]))


@pytest.mark.parametrize("policy", ["contigs", "blocks", "auto"])
@pytest.mark.parametrize("length", [10, 100, 1000])
def test_no_base_is_in_two_splits(tmp_path, policy, length):
    path = tmp_path / "a.fa"
    path.write_text("".join(f">c{i}\n{'ACGGT' * (400 + 40 * i)}\n" for i in range(12)))
    genome = Genome(path)
    try:
        fitted = fit_windows(split_genome(genome, policy, 0.2, 0.2), length, genome)
    except ValueError as error:
        if "could reach from one split into another" not in str(error):
            raise
        return
    taken = np.zeros((12, 10_000), int)
    for intervals in fitted.values():
        for interval in intervals:
            taken[int(interval.chrom[1:]), interval.start : interval.end] += 1
    assert taken.max() == 1


# A spawned worker shares nothing, and imports all there is: one of them shows as much as two.
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_the_right_dna(chr20, method, workers):
    data = GenomeWindows(length=64, batch_size=4, batches=12)
    data.setup()
    alone = list(data.train_dataloader())
    loader = RunLoader(data.train_dataloader().dataset, 12, num_workers=workers)
    loader.multiprocessing_context = multiprocessing.get_context(method)
    for a, b in zip(alone, loader, strict=True):
        assert torch.equal(a["ids_BL"], b["ids_BL"])


def test_threads_read_the_right_dna(chr20):
    windows = batches(chr20)
    alone = [windows.drawn(number, range(4), 4, 500)["ids_BL"] for number in range(40)]
    found = {}

    def read(first):
        for number in range(first, 40, 4):
            found[number] = windows.drawn(number, range(4), 4, 500)["ids_BL"]

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(40))


def test_a_stage_of_a_warm_up_is_plain_values_and_names_what_is_missing():
    (stage,) = GenomeWindows(warmup=[{"batches": 4, "length": 32, "batch_size": 2}]).warmup
    assert (stage.batches, stage.length, stage.batch_size) == (4, 32, 2)
    with pytest.raises(ValueError, match=r"A stage of data.warmup is .*; got \{'batches': 4\}"):
        GenomeWindows(warmup=[{"batches": 4}])
