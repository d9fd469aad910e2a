"""`genossm VERB …`: one line a verb here; everything heavy is imported inside the verb that needs it."""

import importlib
import os
import sys
from collections.abc import Sequence

import genossm
from genossm.errors import fail, is_users_mistake, listed, message_of, nearest

HYDRA_VERBS = {
    "train": "train or fine-tune a model:  genossm train experiment=hyenadna data.fasta=my.fa",
    "evaluate": "run a suite of tasks and write one table:  genossm evaluate suite=quick model=hyenadna",
}
"""Verbs whose arguments are Hydra overrides: their module's `main()` reads them from sys.argv."""

FLAG_VERBS: dict[str, str] = {
    "embed": "sequences, intervals, chromosomes to vectors:  genossm embed --model M --fasta F --out emb.parquet",
    "score": "variants of a VCF to scores:  genossm score --model M --vcf in.vcf.gz --genome G.fa --out scored.vcf.gz",
    "ism": "all substitutions of a region:  genossm ism --model M --bed B --genome G.fa --out ism.parquet",
    "generate": "prompts to sequences:  genossm generate --model M --prompt ACGT --n 10 --length 1000 --out new.fa",
    "plot": "figures of the tables that the other verbs write:  genossm plot --table T --out figure.png",
    "convert": "published checkpoints to ours and back, and to transformers:  genossm convert SOURCE FOLDER --to hf",
    "doctor": "check a checkpoint, or describe the install:  genossm doctor MODEL",
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
            raise ValueError(f"No verb is named {verb!r}; there are: {listed(verbs)}.{nearest(verb, verbs)}")
        run(verb, arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has gone; Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("GENOSSM_TRACEBACK") or not is_users_mistake(error):
            raise
        sys.exit(fail(message_of(error)))


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run one verb with its arguments."""
    # Read when torch is first imported. Its threads wait awake for each other, by themselves for so long that one other
    # busy program makes a training step some thirty times as long; so many looks make it eight times, and none slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    module = importlib.import_module(f"genossm.{verb}")
    if verb in HYDRA_VERBS:
        module.main()
        return
    import typer

    from genossm.flags import command_of

    function = getattr(module, verb)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    text = (function.__doc__ or "").partition("\n\n    Args:")[0]
    app.command(name=verb, help=text)(command_of(function))
    app(args=list(arguments), prog_name=f"genossm {verb}")


def print_help() -> None:
    """List the verbs."""
    lines = [f"  {name:<10} {text}" for name, text in (HYDRA_VERBS | FLAG_VERBS).items()]
    sys.stdout.write("genossm VERB …   (genossm VERB --help tells more)\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
