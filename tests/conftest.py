"""Fixtures shared by all tests: real DNA, real files."""

import os

# Tests never reach for the network, a GPU's autotuner or a tracker of experiments.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Some tests fork, and a fork of a process that has used torch's thread pool hangs at its next parallel loop.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


import pytest
import torch

from genossm.data.datamodule import bundled
from genossm.dna.genome import Genome


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chr20() -> Genome:
    """The bundled 2^20 bp of human chr20."""
    return Genome(bundled("fa.gz"))
