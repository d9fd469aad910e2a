"""The rules of the house that can be tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "genossm").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
TEXTS = sorted(
    path
    for path in ROOT.rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".toml", ".cff", ".sh", ".ipynb")
    and not {"outputs", "build", "dist"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") or part.endswith("venv") for part in path.relative_to(ROOT).parts)
)
OF_THE_WHOLE = {"test_conf", "test_docs", "test_layout", "test_wheel"}
"""Tests that belong to no one module."""
LONGEST_FUNCTION = 60
LONGEST_MODULE = 500

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]], ids=["import", "help", "version"])
def test_starting_loads_nothing_heavy(arguments):
    heavy = ("torch", "lightning", "numpy", "hydra", "rich", "typer")
    run = f"sys.argv[1:] = {arguments}; genossm.cli.main()" if arguments else ""
    code = f"import sys, genossm, genossm.cli; {run}\nprint([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("[]")


@every_module
def test_module_is_small_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_MODULE, f"split it: a module has at most {LONGEST_MODULE} lines"
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "a module opens with a docstring"


@every_module
def test_functions_are_short(path):
    if "kernels" in path.parts:
        pytest.skip("the body of a kernel is one function")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert lines <= LONGEST_FUNCTION, f"split {node.name}: {lines} lines without its docstring"


@every_module
def test_optional_packages_are_not_tried_by_import(path):
    handlers = [node.type for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    caught = {name.id for kind in handlers if kind for name in ast.walk(kind) if isinstance(name, ast.Name)}
    assert "ImportError" not in caught, "ask ops.backend.installed instead: a misspelt name of ours must not pass"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_mirror_the_modules(path):
    folder = path.parent.relative_to(ROOT / "tests").as_posix()
    if folder in ("contract", "benchmarks") or path.stem in OF_THE_WHOLE:
        return
    modules = {module.stem for module in (ROOT / "genossm" / folder).rglob("*.py")}
    modules |= {module.stem.rpartition("_")[2] for module in (ROOT / "genossm" / folder / "kernels").glob("*.py")}
    words = path.stem.split("_")[1:]
    prefixes = {"_".join(words[: i + 1]) for i in range(len(words))}
    assert prefixes & modules, (
        f"name it after a module of genossm/{folder}: test_<module>.py or test_<module>_<what>.py"
    )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_names_no_machine_and_leaves_nothing_open(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    for pattern, why in (
        (r"(?<![\w.~/])/(work|home|root|tmp|Users|mnt|scratch)/\w", "a path of one machine"),
        (r"pypi\.org|pythonhosted|conda\.anaconda|test\.pypi", "the host of a package registry"),
        (r"\b(TODO|FIXME|XXX)\b", "something left to do"),
    ):
        found = re.search(pattern, text)
        assert found is None, f"{why}: {found.group()!r}"


def test_no_drawer_for_everything():
    assert not [p for p in MODULES if re.fullmatch(r"(utils?|helpers?|misc|common)", p.stem)]
