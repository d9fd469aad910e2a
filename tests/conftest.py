"""Fixtures shared by all tests: real DNA, real files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def run_trainings() -> Iterator[Callable[[list[list[str]]], list[list[int]]]]:
    """Runs [folder, override, …] through the real command line, in forks of one process that has imported all there is.

    Returns the exit statuses of each run's processes; what they say is in stderr.txt of their folder.
    """
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(here / "runs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    given, answers = server.stdin, server.stdout

    def ask(jobs: list[list[str]]) -> list[list[int]]:
        given.write(json.dumps(jobs) + "\n")
        given.flush()
        answer = answers.readline()
        assert answer, "the process that runs trainings has ended"
        return json.loads(answer)

    with server:
        yield ask
        given.close()
