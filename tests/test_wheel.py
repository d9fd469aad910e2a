"""What `python -m build` makes works alone: in an empty folder, with nothing of the checkout in reach."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from genossm import checkpoint

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GENOSSM"))}
    ran = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | variables, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("dist")
    # The wheel is built from the source archive, as an upload is.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, ".", cwd=ROOT)
    (found,) = built.glob("*.whl")
    return found


def test_holds_the_package_its_configs_and_the_genome(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert f"genossm/{path.relative_to(ROOT).as_posix()}" in names
    assets = {path.name for path in (ROOT / "genossm" / "assets").iterdir() if path.suffix != ".tokens"}
    assert {Path(name).name for name in names if name.startswith("genossm/assets/")} == assets
    assert not [name for name in names if name.startswith(("tests/", "conf/", "docs/"))]


def test_trains_in_an_empty_folder(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=here)
    variables = {"PYTHONPATH": str(site), "GENOSSM_CACHE": str(tmp_path / "cache")}
    where = run(sys.executable, "-c", "import genossm; print(genossm.__file__)", cwd=here, **variables)
    assert Path(where.strip()).is_relative_to(site)
    run(
        *(sys.executable, site / "bin" / "genossm", "train", "experiment=hyenadna"),
        *("model.d_model=16", "length=64", "data.eval_windows=2"),
        *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu"),
        cwd=here,
        **variables,
    )
    assert [path.name for path in here.iterdir()] == ["outputs"]
    (folder,) = here.glob("outputs/hyenadna/*/model")
    assert checkpoint.load(folder).num_parameters() > 0
