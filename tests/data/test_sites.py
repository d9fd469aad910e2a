"""The bundled tasks: real sites with their letters, decoys with the same ones, splits apart."""

import pytest

from genossm.data.leakage import find_leaks
from genossm.data.sites import BundledTask


def test_splice_sites_have_their_letters_and_decoys_too():
    data = BundledTask(length=40).load()
    rows = [(data.target.names[e.target], e.sequence.upper()[18:22]) for s in data.splits.values() for e in s]
    donors = [middle[2:] for name, middle in rows if name == "donor"]
    acceptors = [middle[:2] for name, middle in rows if name == "acceptor"]
    assert sum(m in ("GT", "GC") for m in donors) > 0.95 * len(donors)
    assert sum(m == "AG" for m in acceptors) > 0.95 * len(acceptors)
    decoys = [middle for name, middle in rows if name == "decoy"]
    assert all(m[2:] == "GT" or m[:2] == "AG" for m in decoys)
    assert min(len(donors), len(acceptors), len(decoys)) > 100


@pytest.mark.parametrize("task", ["splice_sites", "regions"])
def test_no_row_of_test_is_in_train(task):
    data = BundledTask(task=task).load()
    assert all(len(rows) > 50 for rows in data.splits.values())
    for leak in find_leaks(data.splits["train"], data.splits["test"], data.target):
        assert leak.overlapped == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="No bundled task is named 'exons'; there are: splice_sites, regions"):
        BundledTask(task="exons")
    with pytest.raises(ValueError, match="length must be even"):
        BundledTask(length=31)
