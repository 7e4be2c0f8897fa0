"""`python -m tokmat_jax hf`: weights of Hugging Face checkpoints in and out.

    import SOURCE OUT     a checkpoint becomes a workdir
    export WORKDIR OUT    a workdir becomes a checkpoint
    push WORKDIR NAME     a workdir becomes a checkpoint on the hub, with a model card
    sphere WORKDIR OUT    an imported table is set onto the sphere, and what that changes is counted
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokmat_jax.commands.flags import parse
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.sphere import PROMPTS, set_on_sphere
from tokmat_jax.hf.convert import export_weights, import_weights
from tokmat_jax.hf.hub import push_to_hub
from tokmat_jax.hf.peft import export_adapter


@dataclass(frozen=True)
class Import:
    """Make a workdir from a checkpoint. It generates at once, and `train.py --init-from OUT` matures it."""

    source: tyro.conf.Positional[str]
    """Folder with safetensors and config.json, a .gguf file, a name on the hub, or package:NAME for the only .gguf file
    of an installed Python package."""
    out: tyro.conf.Positional[str]
    """Workdir to make; must not exist."""


@dataclass(frozen=True)
class Export:
    """Make a checkpoint that transformers loads from a workdir; `maturation/` in it holds the rest."""

    workdir: tyro.conf.Positional[str]
    """Folder of the run or of the import."""
    out: tyro.conf.Positional[str]
    """Folder to make; must not exist."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the stored weights; left out, that of the import, and float32 for what was trained here."""
    max_shard_size: float = 5.0
    """Largest file in GB (10⁹ bytes); beyond it there are several, with an index."""
    adapter: bool = False
    """Write the run's low-rank adapter alone, as PEFT reads it, instead of the merged model."""


@dataclass(frozen=True)
class Push:
    """Export a workdir to a repository on the Hugging Face hub, with a model card."""

    workdir: tyro.conf.Positional[str]
    """Folder of the run or of the import."""
    name: tyro.conf.Positional[str]
    """OWNER/NAME of the repository; made if it does not exist."""
    private: bool = False
    """Only you can see it."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the stored weights, as for `export`."""
    report: str | None = None
    """Markdown file whose text the model card includes, such as a report card."""


@dataclass(frozen=True)
class Sphere:
    """Set the table of an imported model onto the sphere and count the tokens of greedy text that change."""

    workdir: tyro.conf.Positional[str]
    """Folder of the import."""
    out: tyro.conf.Positional[str]
    """Workdir to make; must not exist."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Beginning to compare the two on; may be given several times, left out there are ten."""
    max_new_tokens: int = 64
    """Tokens of each continuation."""


def run_import(flags: Import) -> None:
    """Imports, and says what was found."""
    found = import_weights(flags.source, Path(flags.out))
    low, mean, high = found.row_norm
    print(f"{flags.out}: {found.model_type}, {found.num_parameters:,} numbers in {found.dtype}; "
          f"rows of the table have norms {low:.3g} .. {high:.3g}, mean {mean:.3g}")
    for note in found.notes:
        print(f"note: {note}")
    print(f'write with it:   python generate.py --workdir {flags.out} --prompt "…"')
    print(f"mature it:       python train.py --init-from {flags.out} --workdir runs/NAME --data.source …")
    print("                 (its learning rate, noise and negatives follow from the weights; it prints what it chose)")


def run_export(flags: Export) -> None:
    """Exports, and says what was written."""
    if flags.max_shard_size <= 0:
        raise UserError(f"--max-shard-size must be positive, found {flags.max_shard_size}")
    if flags.adapter:
        written = export_adapter(Path(flags.workdir), Path(flags.out))
        print(f"{flags.out}: a PEFT adapter of rank {written['r']} for {', '.join(written['target_modules'])}")
        return
    facts = export_weights(Path(flags.workdir), Path(flags.out), flags.dtype, int(flags.max_shard_size * 1e9))
    print(f"{flags.out}: {facts['model_type']}, {facts['num_parameters']:,} numbers in {facts['weights']} weights, "
          f"{facts['dtype']}")
    if facts["derived"]:
        print(f"made from the run's own parameters: {', '.join(facts['derived'])}")


def run_push(flags: Push) -> None:
    """Exports and uploads."""
    report = None if flags.report is None else Path(flags.report)
    print(push_to_hub(Path(flags.workdir), flags.name, flags.private, flags.dtype, report))


def run_sphere(flags: Sphere) -> None:
    """Converts, compares and prints."""
    if flags.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, found {flags.max_new_tokens}")
    found = set_on_sphere(Path(flags.workdir), Path(flags.out), flags.prompt or PROMPTS, flags.max_new_tokens)
    width = max(len(change.prompt) for change in found)
    for change in found:
        print(f"{change.prompt:{width}}  {change.changed:3d} of {change.total} tokens change, "
              f"the first {change.agreed} are written alike")
    changed, total = sum(change.changed for change in found), sum(change.total for change in found)
    print(f"{flags.out}: on the sphere {changed} of {total} tokens ({changed / total:.1%}) of the greedy text change")


_COMMANDS = {"import": (Import, run_import), "export": (Export, run_export), "push": (Push, run_push),
             "sphere": (Sphere, run_sphere)}


def main(args: Sequence[str]) -> None:
    """Runs the command that `args` begin with."""
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if args else 2)
    if args[0] not in _COMMANDS:
        raise UserError(f"unknown command {args[0]!r}; there are {', '.join(_COMMANDS)}")
    kind, run = _COMMANDS[args[0]]
    run(parse(kind, args[1:], prog=f"python -m tokmat_jax hf {args[0]}"))
