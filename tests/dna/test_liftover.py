"""Lift-over by offset and by chain: ends keep their distance, strands turn, gaps have no place."""

import pytest

from genossm.dna.interval import Interval
from genossm.dna.liftover import Chain, Offset

CHAIN = """chain 100 chr1 1000 + 100 400 chrA 900 + 50 345 1
100 5 0
100 0 10
100

chain 50 chr1 1000 + 500 600 chrB 300 - 20 120 2
100
"""


@pytest.fixture
def chain(tmp_path):
    (tmp_path / "a.chain").write_text(CHAIN.replace("345", "355").replace("100 400", "100 405"))
    return Chain(tmp_path / "a.chain")


@pytest.mark.parametrize(
    ("interval", "there"),
    [
        (Interval("chr1", 100, 200), Interval("chrA", 50, 150)),
        (Interval("1", 110, 120, "-"), Interval("chrA", 60, 70, "-")),
        (Interval("chr1", 210, 300), Interval("chrA", 155, 245)),
        (Interval("chr1", 190, 210), None),
        (Interval("chr1", 201, 203), None),
        (Interval("chr1", 300, 310), None),
        (Interval("chr1", 510, 530), Interval("chrB", 250, 270, "-")),
        (Interval("chr2", 100, 110), None),
    ],
)
def test_chain(chain, interval, there):
    assert chain(interval) == there


def test_offset():
    assert Offset(by=10, chrom="chr2R")(Interval("chr2R", 5, 9, "-")) == Interval("chr2R", 15, 19, "-")
    assert Offset(by=10, chrom="chr2R")(Interval("chr3L", 5, 9)) is None
    assert Offset(by=-10)(Interval("x", 5, 9)) is None


def test_what_is_no_chain_file(tmp_path):
    (tmp_path / "a.chain").write_text("chain 100 chr1\n")
    with pytest.raises(ValueError, match="line 1"):
        Chain(tmp_path / "a.chain")
    (tmp_path / "a.chain").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no chain"):
        Chain(tmp_path / "a.chain")
