"""`tokmat COMMAND …` or `python -m tokmat_jax COMMAND …`: train, generate, evaluate, experiment, data, hf."""

import importlib
import sys
from collections.abc import Sequence

import tokmat_jax
from tokmat_jax.errors import UserError

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "write text with a trained model",
    "evaluate": "the report card: a maturation run against its baseline and the human text",
    "experiment": "named experiments, from training to a row in the log",
    "data": "prepare a corpus, or print a batch of a run",
    "hf": "import and export Hugging Face weights",
}


def main(args: Sequence[str]) -> None:
    """Runs the command named by the first of `args`; raises UserError if it is unknown."""
    if list(args) == ["--version"]:
        print(f"tokmat {tokmat_jax.__version__}")
        return
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: tokmat COMMAND …, or python -m tokmat_jax COMMAND …; --version\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        sys.exit(0 if args else 2)
    if args[0] not in COMMANDS:
        raise UserError(f"unknown command {args[0]!r}; there are {', '.join(COMMANDS)}")
    # Import only this command: the libraries of evaluation would delay the others.
    importlib.import_module(f"tokmat_jax.commands.{args[0]}").main(args[1:])
