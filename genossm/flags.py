"""Command-line flags from the signature and docstring of a verb's function: one source for Python, CLI and --help."""

import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


def command_of(function: Callable[..., Any]) -> Callable[..., None]:
    """Return a verb's function as typer takes it.

    A parameter that Python takes by name alone is a named flag, and so is one whose type is a union
    (`str | Path | Backbone`), which is text on the command line; a sequence is one flag with values separated by
    commas. The help of each flag is its entry in the docstring's `Args:`. A function whose result has a `summary()`
    gets `--json`, which prints that summary for machines instead of for eyes (for which it may have a `text()`); one
    that is not `healthy` makes the command end with exit code 1. Every other parameter is left as typer reads it.
    """
    import typer

    hints = get_type_hints(function, include_extras=True)
    helps = argument_texts(function.__doc__ or "")
    parameters: list[inspect.Parameter] = []
    lists: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, str)
        if get_origin(hint) is Annotated:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
            continue
        plain, several = _plain_type(hint)
        default: Any = ... if parameter.default is inspect.Parameter.empty else parameter.default
        if several:
            lists.add(name)
            default = default if default in (..., None) else ",".join(str(value) for value in default)
        if default is not ... or _is_union(hint) or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = typer.Option(default, help=helps.get(name))
        parameters.append(
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                annotation=plain,
                default=inspect.Parameter.empty if default is ... else default,
            )
        )
    summarised = hasattr(hints.get("return"), "summary")
    if summarised:
        option = typer.Option(False, help="print the result as JSON")
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        as_json = values.pop("json", False) if summarised else False
        split = {name: _split(value) if name in lists else value for name, value in values.items()}
        result = function(**split)
        if summarised:
            text = getattr(result, "text", None)
            plain = text is not None and not as_json
            sys.stdout.write(text() if plain else _shown(result.summary(), as_json))
        if getattr(result, "healthy", True) is False:
            # A failed check is a result, not a user's mistake (2).
            raise typer.Exit(1)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__  # type: ignore[attr-defined]
    return command


def argument_texts(docstring: str) -> dict[str, str]:
    """Return the text of each argument in a Google-style docstring, on one line."""
    block = re.search(r"^ *Args:\n(.*?)(?=^ *(?:Returns|Raises|Yields|Example|Examples):|\Z)", docstring, re.M | re.S)
    if block is None:
        return {}
    texts: dict[str, str] = {}
    lines = inspect.cleandoc("\n" + block.group(1)).splitlines()
    names: list[str] = []
    for line in lines:
        entry = re.match(r"([a-z_0-9, ]+): (.*)", line)
        if entry and not line.startswith(" "):
            names = [name.strip() for name in entry.group(1).split(",")]
            texts |= dict.fromkeys(names, entry.group(2))
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """Return the type that the command line reads, and whether it is a list of values."""
    choices = [choice for choice in (get_args(hint) if _is_union(hint) else (hint,)) if choice is not type(None)]
    several = any(get_origin(choice) in (list, tuple, Sequence) for choice in choices)
    if len(choices) == 1 and not several:
        return (hint if not _is_union(hint) else choices[0] | None), False
    optional = _is_union(hint) and type(None) in get_args(hint)
    return (str | None if optional else str), several


def _split(value: Any) -> Any:
    return [item for item in value.split(",") if item] if isinstance(value, str) else value


def _shown(summary: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(summary, default=str) + "\n"
    return "".join(f"{name}: {value}\n" for name, value in summary.items())
