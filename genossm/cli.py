"""`genossm VERB …`: one line a verb here; everything heavy is imported inside the verb that needs it."""

import importlib
import os
import sys
from collections.abc import Sequence

import genossm

HYDRA_VERBS = {
    "train": "train or fine-tune a model:  genossm train experiment=hyenadna data.fasta=my.fa",
}
"""Verbs whose arguments are Hydra overrides: their module's `main()` reads them from sys.argv."""

FLAG_VERBS: dict[str, str] = {
    "embed": "sequences, intervals, chromosomes to vectors:  genossm embed --model M --fasta F --out emb.parquet",
    "bench": "time and memory of ops, training and the data path:  genossm bench ops",
}
"""Verbs whose flags typer derives from the function of the same name in the module of the same name."""


def main(verb: str | None = None) -> None:
    """Run the command line; a user's mistake ends with its message and exit code 2, without a traceback.

    Args:
        verb: what to run; None takes it from the command line.
    """
    verbs = HYDRA_VERBS | FLAG_VERBS
    arguments = sys.argv[1:]
    if verb is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            print_help()
            return
        if arguments[0] == "--version":
            sys.stdout.write(f"genossm {genossm.__version__}\n")
            return
        verb, *arguments = arguments
    try:
        if verb not in verbs:
            raise ValueError(f"No verb is named {verb!r}; there are: {', '.join(verbs)}.")
        run(verb, arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("GENOSSM_TRACEBACK") or not is_users_mistake(error):
            raise
        sys.exit(fail(message_of(error)))


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run one verb with its arguments."""
    module = importlib.import_module(f"genossm.{verb}")
    if verb in HYDRA_VERBS:
        # Hydra and Lightning's launcher of further processes read sys.argv: it must hold a command that can be run
        # again, so the verb leaves it only where the script itself names the verb.
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        sys.argv = [sys.argv[0], *arguments]
        module.main()
        return
    import typer

    from genossm.flags import command_of

    function = getattr(module, verb)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    text = (function.__doc__ or "").partition("\n\n    Args:")[0]
    app.command(name=verb, help=text)(command_of(function))
    app(args=list(arguments), prog_name=f"genossm {verb}")


def is_users_mistake(error: BaseException) -> bool:
    """Tell whether an error is one that the user can mend, whose message says how."""
    from_hydra = type(error).__module__.split(".")[0] in ("hydra", "omegaconf")
    return from_hydra or isinstance(error, ValueError | KeyError | OSError)


def message_of(error: BaseException) -> str:
    """Return an error's text: what was given, what is allowed, what to do."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return str(error)


def fail(message: str) -> int:
    """Print an error to stderr and return the exit code of a user's mistake."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "red"), message))
    return 2


def print_help() -> None:
    """List the verbs."""
    lines = [f"  {name:<10} {text}" for name, text in (HYDRA_VERBS | FLAG_VERBS).items()]
    sys.stdout.write("genossm VERB …   (genossm VERB --help tells more)\n\n" + "\n".join(lines) + "\n")
