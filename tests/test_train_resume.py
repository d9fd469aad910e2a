"""Runs that are killed with SIGKILL and go on: what they leave equals what an uninterrupted run leaves, bit by bit."""

import csv
import re
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LAMBDA = ROOT / "genossm" / "assets" / "lambda_NC_001416.fa.gz"
TINY = [
    f"data.fasta={LAMBDA}",
    "model.d_model=16",
    "model.n_layer=1",
    "model.embed_dropout=0.2",
    "length=64",
    "batch_size=2",
    "data.eval_windows=4",
    "trainer.accelerator=cpu",
    "trainer.max_steps=7",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "optim.lr=0.01",
    "save_every=2",
]
WARMUP = ["data.warmup=[{batches: 4, length: 32, batch_size: 3}]"]
EXACT = ["model.embed_dropout=0", "trainer.precision=32-true"]
DDP = ["trainer=ddp", "trainer.devices=2", "processes=2", "batch_size=1"]
FSDP = [*DDP[1:], "trainer=fsdp"]


def left(folder):
    """Return metrics.csv and the last checkpoint of the only run of a folder."""
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return (run / "metrics.csv").read_text(), torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a, b):
    assert a[0] == b[0]
    for name, tensor in a[1]["state_dict"].items():
        assert torch.equal(tensor, b[1]["state_dict"][name]), name
    first, second = (x[1]["optimizer_states"][0]["state"] for x in (a, b))
    for key in first:
        for name, tensor in first[key].items():
            assert torch.equal(tensor, second[key][name]), (key, name)


def dies(batch, number=signal.SIGKILL, truncate=False):
    kill = f"+callbacks.kill={{_target_: runs.KillAt, batch: {batch}, number: {int(number)}, truncate: {truncate}}}"
    return [kill], -signal.SIGKILL if number == signal.SIGKILL else 128 + number


CASES = {
    "between two saves, twice": ([], [dies(3), dies(5)]),
    "after a save that met a validation": (["save_every=3"], [dies(4)]),
    "by SIGTERM": ([], [dies(3, signal.SIGTERM)]),
    "with a truncated checkpoint": ([], [dies(5, truncate=True)]),
    "masked, with accumulation": (["task=masked_lm", "trainer.accumulate_grad_batches=2"], [dies(7)]),
    "in a warm-up stage, averaging, with 2 workers": ([*WARMUP, "callbacks=ema", "data.num_workers=2"], [dies(3)]),
    "under 2 processes": ([*DDP, *EXACT], [dies(5)]),
}
SLOW_CASES = {
    "before the first save": ([], [dies(1)]),
    "by Ctrl-C": ([], [dies(3, signal.SIGINT)]),
    "in the middle of an accumulation": (["trainer.accumulate_grad_batches=2"], [dies(7), dies(8)]),
    "with 2 workers": (["data.num_workers=2"], [dies(5)]),
    "masked, under 2 processes, with accumulation": (
        [*DDP, "task=masked_lm", "trainer.accumulate_grad_batches=2"],
        [dies(9)],
    ),
    "under 2 processes that share the weights": (FSDP, [dies(5)]),
    "under 2 processes that share the weights, by Muon": ([*FSDP, "optim.optimizer=muon"], [dies(5)]),
}


def training(*runs, folder):
    """Return the arguments of `run_trainings` for runs that leave their files in one folder."""
    return [[str(folder), *TINY, f"output={folder}", *run] for run in runs]


def run_cases(cases, folder, run_trainings):
    """Run every case whole and killed; returns what went to stderr."""
    runs, expected = [], []
    for name, (options, ends) in cases.items():
        runs.append([*options, f"name='{name}, whole'"])
        expected.append(0)
        for number, (end, status) in enumerate([*ends, ([], 0)]):
            runs.append([*options, *end, *(["resume=auto"] if number else []), f"name='{name}, killed'"])
            expected.append(status)
    statuses = run_trainings(training(*runs, folder=folder))
    errors = (folder / "stderr.txt").read_text()
    for run, status, wanted in zip(runs, statuses, expected, strict=True):
        assert set(status) == {wanted}, f"{run} ended with {status}:\n{errors[-3000:]}"
    return errors


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, run_trainings):
    folder = tmp_path_factory.mktemp("resume")
    errors = run_cases({**CASES, "one process": (EXACT, [])}, folder, run_trainings)
    (statuses,) = run_trainings(training([*FSDP, *EXACT, "name='sharing weights, whole'"], folder=folder))
    assert statuses == [0, 0], (folder / "stderr.txt").read_text()[-3000:]
    return folder, errors


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_if_it_had_not_been(resumed, name):
    assert_same(left(resumed[0] / f"{name}, whole"), left(resumed[0] / f"{name}, killed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_a_killed_run_ends_as_if_it_had_not_been_slow(name, tmp_path, run_trainings):
    run_cases({name: SLOW_CASES[name]}, tmp_path, run_trainings)
    assert_same(left(tmp_path / f"{name}, whole"), left(tmp_path / f"{name}, killed"))


def test_a_truncated_checkpoint_is_reported(resumed):
    assert re.search("last.ckpt can't be read .*falling back to the one before it", resumed[1])


@pytest.mark.parametrize("name", ["under 2 processes", "sharing weights"])
def test_two_processes_do_what_one_does_with_the_same_global_batch(resumed, name):
    folder, _ = resumed
    (one, kept_one), (two, kept_two) = left(folder / "one process, whole"), left(folder / f"{name}, whole")
    for weight, tensor in kept_one["state_dict"].items():
        torch.testing.assert_close(kept_two["state_dict"][weight], tensor, atol=1e-4, rtol=1e-3)
    rows_one, rows_two = (list(csv.DictReader(table.splitlines())) for table in (one, two))
    assert [row["step"] for row in rows_one] == [row["step"] for row in rows_two]
    for a, b in zip(rows_one, rows_two, strict=True):
        for name in ("val/loss", "test/loss"):
            assert (a[name] == "") == (b[name] == "")
            assert not a[name] or float(a[name]) == pytest.approx(float(b[name]), rel=1e-5)


@pytest.fixture(scope="module")
def failed(tmp_path_factory, run_trainings):
    """Runs that end with a message."""
    folder = tmp_path_factory.mktemp("failed")
    poison = "+callbacks.poison={_target_: runs.PoisonAt, batch: 3}"
    full = "+callbacks.full={_target_: runs.FullDisk, batch: 3}"
    statuses = run_trainings(training([poison, "name=poison"], [full, "name=full"], folder=folder))
    return folder, statuses, (folder / "stderr.txt").read_text()


def test_a_nan_loss_names_the_batch_and_keeps_the_last_good_checkpoint(failed):
    folder, statuses, errors = failed
    assert statuses[0] == [2]
    assert "error: The loss of batch 3 (counted from 0) is nan. The last good checkpoint is kept." in errors
    (run,) = (folder / "poison").iterdir()
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())


def test_a_full_disk_keeps_the_checkpoint_before(failed):
    folder, statuses, errors = failed
    assert statuses[1] == [2]
    assert "error: The checkpoint of step 4 could not be written" in errors
    (run,) = (folder / "full").iterdir()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
