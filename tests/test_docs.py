"""What the documents say is true: their examples run, their links and lists lead somewhere."""

import importlib
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from genossm.cli import FLAG_VERBS, HYDRA_VERBS
from genossm.config import compose

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"])
FILE_BLOCK = re.compile(
    r"^`((?:genossm|conf|tests)/[\w/]+\.(?:py|yaml))`.*?\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL
)
LINE_BLOCK = re.compile(r"`(\w+)` in `([\w/]+\.py)`:\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDED = "gru or LabelledFasta or SmoothLM or smooth"


def run(*command: str, cwd: Path) -> str:
    variables = os.environ | {"PYTHONPATH": str(cwd)}
    ran = subprocess.run([sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the project with every example of extending.md in its place."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("genossm", "conf", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    text = (ROOT / "docs" / "extending.md").read_text()
    for name, body in FILE_BLOCK.findall(text):
        assert not (copy / name).exists(), f"{name} is there already"
        (copy / name).write_text(body)
    for table, name, line in LINE_BLOCK.findall(text):
        code = (copy / name).read_text()
        opened = re.search(rf"^{table}\b.*= \{{\n", code, re.MULTILINE)
        (copy / name).write_text(code[: opened.end()] + line + code[opened.end() :])
    return copy


def test_examples_of_extending_keep_every_contract(extended):
    shelves = ("tests/contract", "tests/test_conf.py", "tests/ops/test_smooth.py")
    out = run("-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", ADDED, *shelves, cwd=extended)
    passed = re.findall(r"^PASSED (\S+)", out, re.MULTILINE)
    for word in ("gru", "LabelledFasta", "SmoothLM", "test_smooth"):
        assert sum(word in name for name in passed) >= 2, word


def test_example_verb_of_extending_runs(extended):
    fasta = extended / "a.fa"
    fasta.write_text(">one\nACGTNacg\n")
    code = "from genossm.cli import main; main()"
    assert "count" in run("-c", code, "--help", cwd=extended)
    assert run("-c", code, "count", str(fasta), cwd=extended) == "A 2  C 2  G 2  T 1  N 1\n"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_opens_with_its_two_commands():
    (first, *_) = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    train, test = first.splitlines()
    assert train == "pip install -e . && python train.py experiment=hyenadna"
    assert test == "pip install -e '.[dev]' && pytest"


def commands() -> list[list[str]]:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"genossm \w|python train\.py", line)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_documents_name_what_there_is(words):
    verb, rest = ("train", words[2:]) if words[0] == "python" else (words[1], words[2:])
    if verb in HYDRA_VERBS:
        # Of a sweep the first job.
        given = [word.partition(",")[0] if "-m" in rest else word for word in rest if "=" in word]
        compose(verb, [word for word in given if not word.startswith("hydra")])
        return
    assert verb in FLAG_VERBS
    known = inspect.signature(getattr(importlib.import_module(f"genossm.{verb}"), verb)).parameters
    flags = [word.removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")]
    assert set(flags) <= set(known)


@pytest.mark.parametrize("name", ["README.md", "docs/finetuning.md", "docs/using.md"])
def test_examples_run(name, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    script = tmp_path / "examples.py"
    script.write_text("\n".join(blocks))
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_readme_maps_every_file():
    readme = (ROOT / "README.md").read_text()
    scripts = runpy.run_path(str(ROOT / "scripts" / "map.py"))
    assert scripts["redrawn"](readme) == readme, "run python scripts/map.py"


# The loop that runs a notebook asks for what Python deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_its_first_cell_to_its_last(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
