"""Sequence models on DNA. Importing this package loads nothing heavy; its modules load on first use."""

import importlib
from types import ModuleType

__version__ = "0.1.0"


class GenossmWarning(UserWarning):
    """The one warning class of the package."""


def __getattr__(name: str) -> ModuleType:
    """Import a submodule on first use, so that `import genossm; genossm.checkpoint.load(...)` works."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module 'genossm' has no attribute {name!r}")
