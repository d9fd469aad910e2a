import json
from collections.abc import Sequence
from pathlib import Path

import typer
from typer.testing import CliRunner

from genossm.flags import argument_texts, command_of


class Result:
    def __init__(self, **values):
        self.values = values

    def summary(self):
        return self.values


def verb(
    model: str | Path | None, first: int = 3, names: Sequence[str] = ("a", "b"), where: Path | None = None
) -> Result:
    """Do it.

    Args:
        model: what to run,
            wherever it is.
        first, names: two
            things.
    """
    return Result(model=model, first=first, names=list(names), where=where)


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command_of(verb))
    return CliRunner().invoke(app, list(arguments))


def test_unions_are_flags_and_sequences_have_commas():
    ran = invoke("--model", "m", "--names", "x,y,z", "--json")
    assert json.loads(ran.stdout) == {"model": "m", "first": 3, "names": ["x", "y", "z"], "where": None}
    assert "names: ['a', 'b']" in invoke("--model", "m").stdout
    assert invoke("--first", "1").exit_code == 2


def test_help_is_the_docstring():
    assert argument_texts(verb.__doc__) == {
        "model": "what to run, wherever it is.",
        "first": "two things.",
        "names": "two things.",
    }
    assert "wherever it is" in invoke("--help").stdout
