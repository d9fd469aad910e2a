"""What the tests of recurrent ops share: directions, lengths and documents of a batch."""

import pytest
import torch


@pytest.fixture(
    params=["plain", "reverse", "lengths", "reverse-lengths", "resets", "reverse-resets", "all", "reverse-all"]
)
def rows(request):
    """Options of an op for a batch of 2 rows of 37 positions."""
    gen = torch.Generator().manual_seed(1)
    options: dict = {"reverse": "reverse" in request.param, "return_state": True}
    if "lengths" in request.param or "all" in request.param:
        options["lengths_B"] = torch.tensor([37, 20])
    if "resets" in request.param or "all" in request.param:
        options["resets_BL"] = torch.rand(2, 37, generator=gen) < 0.1
        # Also where a row begins, ends and is padded.
        options["resets_BL"][0, 0] = options["resets_BL"][1, 20] = options["resets_BL"][1, 36] = True
    return options
