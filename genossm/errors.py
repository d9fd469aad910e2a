"""What a user's mistake is, and how it is told: one message, no traceback, exit code 2."""

import difflib
import sys
from collections.abc import Iterable

USERS_MISTAKE = 2
"""Exit code of a run that ended with a message about what the user can mend."""


def is_users_mistake(error: BaseException) -> bool:
    """Tell whether an error is one that the user can mend, whose message says how."""
    from_config = type(error).__module__.split(".")[0] in ("hydra", "omegaconf")
    from_lightning = type(error).__name__ == "MisconfigurationException"
    return from_config or from_lightning or isinstance(error, ValueError | KeyError | OSError)


def message_of(error: BaseException) -> str:
    """Return an error's text: what was given, what is allowed, what to do."""
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else error.strerror
    return str(error)


def fail(message: str) -> int:
    """Print an error to stderr and return the exit code of a user's mistake."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "red"), printable(message)))
    sys.stderr.flush()
    return USERS_MISTAKE


def printable(text: str) -> str:
    """Return a text whose control characters are escaped: names in files must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return names in one line, the first `most` of them and how many there are in all."""
    shown = list(names)
    return ", ".join(shown[:most]) + (f", … ({len(shown)} in all)" if len(shown) > most else "")


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" where an option looks like `name`, else nothing."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
