"""Hydra configs: where they lie, how they are composed, and what is said about a wrong key or value."""

import contextlib
import inspect
import json
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genossm.errors import fail, is_users_mistake, listed, message_of, nearest

_ALSO = {"model": {"pretrained"}, "trainer": {"precision"}}
"""Keys of a group that the verbs read themselves, so that its target's signature says nothing about them."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def conf_folder() -> Path:
    """Return the folder of the YAML files: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the checked config of `genossm NAME OVERRIDES`.

    Raises:
        ValueError: an override can't be read, or names no key, group or value that there is; see `check`.
    """
    from hydra.errors import HydraException

    try:
        config = _compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, name, overrides)) from None
    check(config, name)
    return config


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def launch(name: str, function: Callable[[DictConfig], Any], objective: Callable[[Any], float] | None = None) -> None:
    """Run a Hydra verb on the overrides of the command line; a user's mistake ends with its message and exit code 2.

    With `--json` the summary of each run is a line on the standard output, and all else goes to the standard error.

    Args:
        name: the verb, which may stand before the overrides on the command line.
        function: what is called with the composed, checked config; its result has a `summary()`.
        objective: what a sweeper minimises, of a result.
    """
    import hydra
    from hydra.errors import HydraException

    command = sys.argv
    given = command[1:]
    as_json = "--json" in given
    arguments = [argument for argument in (given[1:] if given[:1] == [name] else given) if argument != "--json"]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    @hydra.main(config_path=str(conf_folder()), config_name=name, version_base="1.3")
    def app(config: DictConfig) -> Any:
        # Lightning starts further processes by running sys.argv again, so the verb must stand in it by now.
        sys.argv = command
        try:
            check(config, name)
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                result = function(config)
            if as_json and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
                sys.stdout.write(json.dumps(result.summary(), default=str) + "\n")
            return result if objective is None else objective(result)
        except Exception as error:
            # Hydra would print its own lines before an exception that it sees.
            if os.environ.get("GENOSSM_TRACEBACK") or not is_users_mistake(error):
                raise
            raise SystemExit(fail(message_of(error))) from None

    sys.argv = [command[0], *arguments]
    report_to_stderr()
    try:
        app()
    except (HydraException, OmegaConfBaseException) as error:
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        raise ValueError(explain(error, name, overrides)) from None
    finally:
        sys.argv = command


def report_to_stderr() -> None:
    """Show what the package logs."""
    ours = logging.getLogger("genossm")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)


def explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """Return what is wrong with the overrides: the key or value, what there is, and the nearest of it."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return (
            f"The override {error.override!r} can't be read. Write key=value, lists as key=[a,b], and put quotes around"
            " a value with spaces or special characters: 'key=\"a b\"', 'key=[\"a=b\"]'."
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).lstrip("/").partition("/")
        options = choices(group)
        if not options:
            return f"{error.missing_cfg_file!r} is no config file; the groups are: {listed(groups())}."
        return f"No {group} is named {choice!r}; there are: {listed(options, 60)}.{nearest(choice, options)}"
    key = re.search(r"'([^']+)'", str(error))
    unknown = isinstance(error, Exception) and re.match(r"Could not (override|delete)", str(error))
    if unknown and key:
        path = key[1].partition("@")[0].lstrip("+~/")
        kept = [o for o in overrides if o.lstrip("+~/").partition("=")[0].partition("@")[0] != path]
        if len(kept) < len(overrides):
            hint = f" Keys of its runs go into overrides: 'overrides=[\"{path}=…\"]'." if name == "evaluate" else ""
            return _unknown_key(path, compose(name, kept)) + hint
    return " ".join(str(error).split())


def _unknown_key(path: str, config: DictConfig) -> str:
    node: Any = config
    parts = path.replace("/", ".").split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            where = ".".join(parts[:depth])
            if not isinstance(node, DictConfig):
                return f"{where} is a value and has no key {part!r}."
            return unknown_key(where, part, [str(k) for k in node if k != "_target_"])
        node = node[part]
    return f"{path} can't be changed."


def unknown_key(where: str, key: str, options: Sequence[str]) -> str:
    """Return the message about a key that is not there."""
    place = f"{where} has no key {key!r}" if where else f"No key is named {key!r}"
    return f"{place}; there are: {listed(options, 60)}.{nearest(key, options)}"


def groups() -> list[str]:
    """Return the names of the config groups."""
    return sorted(path.name for path in conf_folder().iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    """Return what a group offers."""
    folder = conf_folder() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def check(config: DictConfig, name: str) -> None:
    """Refuse keys that nothing reads and values of the wrong kind, wherever they were written.

    The verb's YAML says which keys stand at the top and of what kind they are; below, the signature of each section's
    `_target_` does.

    Raises:
        ValueError: it names the key, and lists what there is.
    """
    try:
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None
    schema: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{name}.yaml"))  # type: ignore[assignment]
    sections = [next(iter(e)).split()[-1].split("@")[0] for e in schema.get("defaults", []) if isinstance(e, Mapping)]
    known = {key for key in schema if key not in ("defaults", "hydra")} | {
        section.strip("/") for section in sections if "hydra/" not in section and section != "experiment"
    }
    for key, value in values.items():
        if key == "hydra":
            continue
        if key not in known and key not in _experiment_keys():
            raise ValueError(unknown_key("", key, sorted(known)))
        default = schema.get(key)
        if isinstance(value, Mapping):
            _check_section(key, value)
        elif isinstance(default, int | float | str) and not _fits(value, type(default)):
            raise ValueError(f"{key} must be {_WORDS[type(default)]}; got {value!r}.")


def without_targets(values: Any) -> Any:
    """Return plain values without the names of what they are passed to, as a note for readers."""
    if isinstance(values, Mapping):
        return {key: without_targets(value) for key, value in values.items() if key != "_target_"}
    return [without_targets(value) for value in values] if isinstance(values, list) else values


def _experiment_keys() -> set[str]:
    """Return the keys that only shipped experiments set: what some verbs read beyond the verb's own YAML."""
    files = (conf_folder() / "experiment").rglob("*.yaml")
    return {str(key) for file in files for key in OmegaConf.load(file) if key != "defaults"}


def _check_section(path: str, values: Mapping[str, Any]) -> None:
    from hydra.utils import get_object

    for key, value in values.items():
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, Mapping):
                _check_section(f"{path}.{key}" + (f"[{index}]" if isinstance(value, list) else ""), item)
    if "_target_" not in values:
        return
    try:
        target = get_object(values["_target_"])
    except Exception as error:
        raise ValueError(f"{path}._target_ names nothing that can be imported: {values['_target_']!r}.") from error
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    hints = _hints(target)
    for key, value in values.items():
        if key in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_") or key in _ALSO.get(path, ()):
            continue
        if key not in parameters:
            raise ValueError(unknown_key(path, key, [k for k in values if k in parameters]))
        if value is None and path == "trainer":
            continue  # The verb computes it.
        if not isinstance(value, Mapping) and not _fits(value, hints.get(key, Any)):
            raise ValueError(f"{path}.{key} must be {_word(hints[key])}; got {value!r}.")


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:
        # An annotation that only a type checker can resolve; the target's own checks remain.
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain value can be what an annotation says; annotations that say nothing about it fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is Any:
        # A class since Python 3.11.
        return True
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, str)
    shape = origin or hint
    if not inspect.isclass(shape):
        return True
    if issubclass(shape, Sequence):
        items = [a for a in arguments if a is not Ellipsis]
        if not isinstance(value, list):
            return False
        kinds = items if origin is tuple and Ellipsis not in arguments else items[:1] * len(value)
        return not items or (len(kinds) == len(value) and all(map(_fits, value, kinds)))
    # Any other class is built from a section of its own.
    return shape is object or isinstance(value, Mapping)


def _word(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_word(argument) for argument in arguments))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if hint in _WORDS:
        return _WORDS[hint]
    shape = typing.get_origin(hint) or hint
    if inspect.isclass(shape) and issubclass(shape, Sequence):
        items = [_word(argument).removeprefix("a ") for argument in arguments if argument is not Ellipsis]
        return f"a list of {len(items)} {items[0]}s" if len(items) > 1 else f"a list of {''.join(items) or 'value'}s"
    return getattr(hint, "__name__", str(hint))
