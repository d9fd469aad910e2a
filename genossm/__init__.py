"""Sequence models on DNA. Importing this package loads nothing heavy; its modules load on first use."""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class GenossmWarning(UserWarning):
    """The one warning class of the package."""


class _Verb(ModuleType):
    """A module that holds a function of its own name and can be called as that function: `genossm.embed(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package: modules become verbs here, as the import system hangs them into it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and callable(value.__dict__.get(name)):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> ModuleType:
    """Import a submodule on first use, so that `import genossm; genossm.checkpoint.load(...)` works."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module 'genossm' has no attribute {name!r}")
