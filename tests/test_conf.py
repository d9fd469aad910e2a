"""The YAML files: every target exists, every experiment says what it is and runs.

Experiments are found by their files. Each runs one step under TINY, of which the keys that it has are taken. Where
that doesn't fit, its header says what does: `# tiny: model.d_state=4 data.path=null`.
"""

import dataclasses
import math
import re
from importlib import resources
from pathlib import Path

import hydra.utils
import pytest
from omegaconf import DictConfig, OmegaConf

from genossm.config import conf_folder
from genossm.models.base import BackboneConfig, model_types
from genossm.train import compose, train

CONF = conf_folder()
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(path.relative_to(CONF / "experiment") for path in (CONF / "experiment").rglob("*.yaml"))

TINY = {
    "length": 64,
    "batch_size": 2,
    "gradient_checkpointing": False,
    "compile": False,
    "record": False,
    "model.pretrained": None,
    "model.d_model": 16,
    "model.d_inner": None,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.d_state": 4,
    "model.headdim": 8,
    "model.dt_rank": "auto",
    "model.max_length": 66,
    "data.fasta": str(resources.files("genossm") / "assets" / "lambda_NC_001416.fa.gz"),
    "data.bed": None,
    "data.warmup": [],
    "data.eval_windows": 2,
    "data.eval_batch_size": 2,
    "data.num_workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.precision": "32-true",
    "trainer.max_steps": 1,
    "trainer.val_check_interval": 1,
    "trainer.accumulate_grad_batches": 1,
}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
every_experiment = pytest.mark.parametrize("name", [path.with_suffix("").as_posix() for path in EXPERIMENTS])


def header(name: str) -> list[str]:
    """Return the comment lines that an experiment's file opens with, without Hydra's own."""
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    comments = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return [line.removeprefix("#").strip() for line in comments if "@package" not in line]


def tiny(name: str, output: Path) -> DictConfig:
    """Return the config of an experiment, shrunk until one step takes a second."""
    own = [word for line in header(name) if line.startswith("tiny:") for word in line.split()[1:]]
    config = compose([f"experiment={name}", f"output={output}", *own])
    OmegaConf.set_struct(config, False)
    said = {word.lstrip("+").partition("=")[0] for word in own}
    for key, value in TINY.items():
        parent = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        if key not in said and isinstance(parent, DictConfig) and key.rpartition(".")[2] in parent:
            OmegaConf.update(config, key, value)
    return config


def targets(value: object) -> list[str]:
    """Return every `_target_` inside a config."""
    if isinstance(value, dict):
        inside = [target for child in value.values() for target in targets(child)]
        return [value["_target_"], *inside] if "_target_" in value else inside
    return [target for child in value for target in targets(child)] if isinstance(value, list) else []


@every_file
def test_every_target_exists(path):
    for target in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False)):
        assert callable(hydra.utils.get_object(target)), target


@every_file
def test_nothing_runs_or_leaves_while_a_file_is_read(path):
    text = re.sub(r"(^|\s)#.*", "", path.read_text())
    assert not re.search(r"\$\{[\w.]+:", text), "no resolver: a value is a value"
    assert not re.search(r"monitor:\s*['\"]?test", text), "the test split never chooses a checkpoint"
    assert not re.search(r":\s*['\"]?(/|~|[A-Za-z]:\\)", text), "no absolute path"


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_file_agrees_with_its_config_class(path):
    values = OmegaConf.to_container(OmegaConf.load(path))
    config_class = hydra.utils.get_class(values.pop("_target_"))
    values.pop("pretrained")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    shared = {field.name for field in dataclasses.fields(BackboneConfig)} - {"d_model", "n_layer"}
    assert set(fields) - shared <= set(values) <= set(fields)
    if path.stem == config_class.model_type:
        default = config_class().to_dict()
        assert values == {key: list(v) if isinstance(v := default[key], tuple) else v for key in values}


def test_every_backbone_has_a_file():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} >= set(model_types())


@every_experiment
def test_experiment_opens_with_its_command(name):
    lines = header(name)
    assert re.match(rf"python train\.py experiment={re.escape(name)}(\s|$)", lines[0])
    assert len([line for line in lines[1:] if line and not line.startswith("tiny:")]) >= 1, "say what it is"
    if name.startswith("pretrain/"):
        assert "Cost:" in " ".join(lines)
        assert "Expected:" in " ".join(lines)


@every_experiment
def test_experiment_is_whole_at_its_own_size(name):
    config = compose([f"experiment={name}"])
    OmegaConf.resolve(config)
    assert not OmegaConf.missing_keys(config)
    model = OmegaConf.to_container(config.model)
    model.pop("pretrained", None)
    shape = hydra.utils.instantiate(model, _convert_="all")
    context = getattr(shape, "max_length", None)
    assert context is None or context >= config.length
    hydra.utils.instantiate(config.optim, _convert_="all")


@every_experiment
def test_experiment_runs_one_step(name, tmp_path):
    result = train(tiny(name, tmp_path))
    assert math.isfinite(next(value for key, value in result.metrics.items() if key.endswith("/loss")))
    assert (result.folder / "model" / "model.safetensors").exists()
