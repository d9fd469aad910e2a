"""The rules of the house that can be tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "genossm").rglob("*.py"))


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('torch', 'lightning', 'numpy', 'hydra')"
    code = f"import genossm, genossm.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_is_small_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "split it: a module has at most 500 lines"
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), "a module opens with a docstring"


def test_no_drawer_for_everything():
    assert not [p for p in MODULES if re.fullmatch(r"(utils?|helpers?|misc|common)", p.stem)]
