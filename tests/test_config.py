import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from genossm.cli import main
from genossm.config import check, choices, compose, launch
from genossm.train import TrainResult

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=hyenadma"], "No experiment is named 'hyenadma'; there are: .*Did you mean 'hyenadna'"),
        (["model=hyena"], "No model is named 'hyena'; there are: .*Did you mean 'hyenadna'"),
        (["modle.d_model=3"], "No key is named 'modle'; there are: .*Did you mean 'model'"),
        (["model.d_modle=3"], "model has no key 'd_modle'; there are: d_model, .*Did you mean 'd_model'"),
        (["+model.width=3"], "model has no key 'width'; there are: d_model"),
        (["+lenght=3"], "No key is named 'lenght'; there are: .*Did you mean 'length'"),
        (["~optim.lrr"], "optim has no key 'lrr'.*Did you mean 'lr'"),
        (["length.x=3"], "length is a value and has no key 'x'"),
        (["modle.a=1", "trainer.max_stepz=2"], "has no key|is named"),
        (["length=long"], "length must be a whole number; got 'long'"),
        (["compile=maybe"], "compile must be true or false; got 'maybe'"),
        (["optim.lr=fast"], "optim.lr must be a number; got 'fast'"),
        (["optim.betas=[0.9]"], r"optim.betas must be a list of 2 numbers; got \[0.9\]"),
        (["data.fasta=3"], "data.fasta must be text or a list of text"),
        (["trainer.max_steps=many"], "trainer.max_steps must be a whole number"),
        (["a b"], "'a b' can't be read. Write key=value"),
        (["data.fasta=[a,b"], "can't be read"),
        (["data.fasta=${nothing}"], "nothing"),
        (["data.fasta=???"], "data.fasta"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_override_is_named_with_what_there_is(overrides, message):
    with pytest.raises(ValueError, match=message) as raised:
        compose("train", overrides)
    assert "\n" not in str(raised.value)


def test_a_typo_in_a_yaml_file_is_found_too():
    config = compose("train", [])
    config._set_flag("struct", False)
    config.optim.lrr = 1.0
    with pytest.raises(ValueError, match=r"optim has no key 'lrr'.*Did you mean 'lr'"):
        check(config, "train")


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_composes(model):
    assert compose("train", [f"model={model}"]).model["_target_"]


def test_the_command_line_says_it_in_one_line(tmp_path):
    command = [sys.executable, "train.py", "model.d_modle=3", f"output={tmp_path}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"})
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: model has no key 'd_modle'; there are: d_model")
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_installed_command_says_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.setattr(sys, "argv", ["genossm", "train", "model.d_modle=3", f"output={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: model has no key 'd_modle'; there are: d_model")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_examples_of_help_compose(verb):
    header = OmegaConf.load(ROOT / "conf" / f"{verb}.yaml").hydra.help.header
    examples = [
        shlex.split(line.split("   ")[0]) for line in header.splitlines() if line.startswith(f"  genossm {verb} ")
    ]
    assert len(examples) >= 4
    for example in examples:
        sweep = "-m" in example
        compose(verb, [word.split(",")[0] if sweep else word for word in example[2:] if "=" in word])


def test_json_alone_is_on_the_standard_output(monkeypatch, capsys):
    def run(config):
        sys.stdout.write("a report for the eyes\n")
        return TrainResult(Path("run"), None, {"val/bits": float(config.seed)})

    monkeypatch.setattr("sys.argv", ["genossm", "train", "--json", "seed=7"])
    launch("train", run)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["metrics"] == {"val/bits": 7.0}
    assert "a report for the eyes" in captured.err


def test_threads_of_the_command_line_wait_awake_for_a_while_alone(monkeypatch, capsys):
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(sys, "argv", ["genossm", "train", "--cfg", "job"])
    main()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0
    assert "max_steps" in capsys.readouterr().out
