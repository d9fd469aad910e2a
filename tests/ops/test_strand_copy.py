import numpy as np
import pytest

from genossm.dna import alphabet
from genossm.ops.strand_copy import strand_copy, strand_copy_ref


@pytest.fixture(scope="module")
def store_S():
    rng = np.random.default_rng(0)
    codes = rng.integers(alphabet.A, alphabet.T + 1, 5000, dtype=np.uint8)
    codes[rng.random(5000) < 0.02] = alphabet.N
    codes[2000:2400] = alphabet.N
    codes[3000:] = np.where(codes[3000:] == alphabet.N, alphabet.A, codes[3000:])
    return np.where(rng.random(5000) < 0.4, codes | alphabet.SOFT_MASK, codes).astype(np.uint8)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 255, 257, 1000, 2000])
def test_equals_reference_on_both_strands(store_S, length, upper):
    rng = np.random.default_rng(length)
    starts_B = np.concatenate([rng.integers(0, 5000 - length + 1, 9), [0, 5000 - length, 5000 - length]])
    turned_B, rows_R = rng.random(12) < 0.5, np.flatnonzero(rng.random(12) < 0.8)
    turned_B[-2:] = True, False
    fast_BL, plain_BL = (np.full((12, length), 99, np.uint8) for _ in range(2))
    found = strand_copy(store_S, starts_B, turned_B, upper, fast_BL, rows_R)
    assert found == strand_copy_ref(store_S, starts_B, turned_B, upper, plain_BL, rows_R)
    assert np.array_equal(fast_BL, plain_BL)
    left = np.setdiff1d(np.arange(12), rows_R)
    assert (fast_BL[left] == 99).all()


@pytest.mark.parametrize("upper", [True, False])
def test_reads_as_the_alphabet_does(store_S, upper):
    out_BL = np.empty((2, 700), np.uint8)
    found = strand_copy(store_S, np.array([1800, 1800]), np.array([False, True]), upper, out_BL, np.arange(2))
    codes_L = store_S[1800:2500] & (0x7F if upper else 0xFF)
    assert found
    assert np.array_equal(out_BL[0], codes_L)
    assert np.array_equal(out_BL[1], alphabet.reverse_complement(codes_L))
    assert alphabet.to_text(out_BL[1]) == alphabet.reverse_complement_text(alphabet.to_text(codes_L))


def test_n_is_found_in_the_rows_that_are_filled_alone(store_S):
    out_BL, starts_B = np.empty((2, 500), np.uint8), np.array([2000, 4000])
    for turned in (False, True):
        turned_B = np.full(2, turned)
        assert not strand_copy(store_S, starts_B, turned_B, False, out_BL, np.array([1]))
        assert strand_copy(store_S, starts_B, turned_B, False, out_BL, np.array([0]))


@pytest.mark.parametrize("start", [-1, 4991])
def test_a_window_beyond_the_store_is_refused(store_S, start):
    with pytest.raises(ValueError, match="A window of 10 bases reaches beyond the 5000"):
        strand_copy(store_S, np.array([start]), np.array([True]), True, np.empty((1, 10), np.uint8), np.arange(1))


def test_without_numba_it_says_so_and_takes_the_plain_way(store_S, monkeypatch, caplog):
    arguments = store_S, np.array([30, 40]), np.array([False, True]), True
    fast_BL, plain_BL = np.empty((2, 90), np.uint8), np.empty((2, 90), np.uint8)
    strand_copy(*arguments, fast_BL, np.arange(2))
    monkeypatch.setattr("genossm.ops.strand_copy.runs", lambda name, device: f"{name} is not installed")
    strand_copy(*arguments, plain_BL, np.arange(2))
    assert np.array_equal(fast_BL, plain_BL)
    assert "strand_copy runs on the slower 'reference' backend: numba is not installed" in caplog.text
