import re

import lightning as L
import pytest
import torch

from genossm import checkpoint
from genossm.callbacks import WeightAverage
from genossm.data.datamodule import bundled
from genossm.train import build_model, compose, train


def run(folder, *overrides, steps=3):
    genome = bundled("fa.gz").with_name("lambda_NC_001416.fa.gz")
    shape = ["model.d_model=8", "model.n_layer=1", "length=32", "batch_size=2", "data.eval_windows=2", "save_every=1"]
    run = [f"output={folder}", f"data.fasta={genome}", "trainer.accelerator=cpu", "optim.lr=0.05", "optim.warmup=0"]
    return train(compose([*shape, *run, f"trainer.max_steps={steps}", "trainer.val_check_interval=2", *overrides]))


def test_averages_follow_the_definition_and_are_what_the_run_ends_with(tmp_path):
    plain = [run(tmp_path / f"{steps}", "optim.schedule=constant", steps=steps) for steps in (1, 2, 3)]
    averaged = run(tmp_path / "ema", "optim.schedule=constant", "callbacks=ema", "callbacks.ema.decay=0.15")
    last = torch.load(averaged.folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights = [dict(result.model.named_parameters()) for result in plain]
    L.seed_everything(1, verbose=False)
    start = dict(build_model(compose(["model.d_model=8", "model.n_layer=1"]).model).named_parameters())
    for name, got in checkpoint.load(averaged.folder / "model").named_parameters():
        assert torch.equal(last["state_dict"][f"model.{name}"], weights[2][name]), "training goes on with the weights"
        expected = start[name].detach()
        for decay, weight in zip((0.1, 0.15, 0.15), weights, strict=True):
            expected = expected + (1 - decay) * (weight[name].detach() - expected)
        torch.testing.assert_close(got, expected)
    assert averaged.metrics["val/bits"] != plain[2].metrics["val/bits"]


@pytest.mark.parametrize("decay", [0, 1, -0.5])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match="must lie in"):
        WeightAverage(decay)


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_a_bar_with_everything_in_one_line(tmp_path, monkeypatch, capsys, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    run(tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    bars = [line for line in re.split(r"[\r\n]+", shown) if "tokens/s" in line]
    assert all(len(line) <= columns for line in bars)
    assert re.search(
        r"3/3 +loss \d\.\d{3}  bits/base \d\.\d{3} .*[\d,]+ tokens/s .*left +[\d-]:[\d-]{2}:[\d-]{2}", bars[-1]
    )


def test_without_a_terminal_each_report_is_one_line(tmp_path, capsys):
    run(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    form = r"step \d/3  loss \d\.\d{3}  bits/base \d\.\d{3}(  val \d\.\d{3})?  [\d,]+ tokens/s  \d+ s left"
    assert len(lines) == 3
    assert all(re.fullmatch(form, line) for line in lines)
