import numpy as np
import pytest

from genossm.data.transforms import IGNORED, MaskTokens
from genossm.dna import alphabet
from genossm.dna.tokenizer import CharTokenizer


def test_training_may_choose_another_share():
    ids = np.full((4, 1000), alphabet.A, np.uint8)
    objective = MaskTokens(fraction=0.15, train_fraction=0.5)
    shares = [(o(ids, np.random.default_rng(0))[1] != IGNORED).mean() for o in (objective, objective.in_training())]
    assert shares == pytest.approx([0.15, 0.5], abs=0.03)
    assert MaskTokens(fraction=0.2).in_training().fraction == 0.2


@pytest.mark.parametrize("values", [{"fraction": 0.0}, {"train_fraction": 1.5}, {"mask": 0.9, "random": 0.2}])
def test_impossible_shares_are_refused(values):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]|sum to at most 1"):
        MaskTokens(**values)


def test_targets_are_corrupted_as_published():
    rng = np.random.default_rng(1)
    ids = rng.integers(alphabet.A, alphabet.T + 1, (8, 10_000), dtype=np.uint8)
    ids[:, 500:600] = alphabet.N
    corrupted, targets = MaskTokens()(ids, rng)
    chosen = targets != IGNORED
    assert (targets[chosen] == ids[chosen]).all()
    assert (corrupted[~chosen] == ids[~chosen]).all()
    assert chosen[ids != alphabet.N].mean() == pytest.approx(0.15, abs=0.01)
    assert not chosen[ids == alphabet.N].any()
    masked, kept = corrupted[chosen] == CharTokenizer.mask_id, corrupted[chosen] == targets[chosen]
    # A random base is the right one by chance in a quarter of the cases.
    assert [masked.mean(), kept.mean()] == pytest.approx([0.8, 0.1 + 0.1 / 4], abs=0.01)
    assert set(np.unique(corrupted[chosen])) == {CharTokenizer.mask_id, *range(alphabet.A, alphabet.T + 1)}


def test_a_row_with_a_base_has_a_target_and_a_row_of_n_has_none():
    ids = np.full((2, 64), alphabet.N, np.uint8)
    ids[0, 40] = alphabet.C
    for seed in range(20):
        corrupted, targets = MaskTokens()(ids, np.random.default_rng(seed))
        assert targets[0, 40] == alphabet.C
        assert (targets[1] == IGNORED).all()
        assert (corrupted[1] == alphabet.N).all()
