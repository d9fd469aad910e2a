import numpy as np
import pytest

from genossm.data.transforms import IGNORED, MaskTokens
from genossm.dna import alphabet


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
