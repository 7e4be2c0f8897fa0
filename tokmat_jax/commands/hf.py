"""`python -m tokmat_jax hf`: weights of Hugging Face checkpoints in and out.

    import SOURCE OUT     a checkpoint becomes a workdir
    export WORKDIR OUT    a workdir becomes a checkpoint
    push WORKDIR NAME     a workdir becomes a checkpoint on the hub, with a model card
    tail WORKDIR OUT      a trained tail goes in front of an imported language model
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
from tokmat_jax.hf.tail import export_tail, put_in_front, shipped_tail
from tokmat_jax.storage.workdir import load_config


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
    """Write what the run trained alone, instead of the merged model: its low-rank adapter, as PEFT reads it, or its
    tail in front of a language model, as `hf tail` reads it."""


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
class Front:
    """Put a trained tail in front of an imported language model, which stays as it is: its own text in fewer passes."""

    workdir: tyro.conf.Positional[str]
    """Folder of the import."""
    out: tyro.conf.Positional[str]
    """Workdir to make; must not exist."""
    source: str | None = None
    """Folder of the tail (`hf export --adapter`); left out, the one that is shipped for these weights."""


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
    if shipped_tail(Path(flags.out)) is not None:
        print(f"a tail is shipped for it:  python -m tokmat_jax hf tail {flags.out} runs/NAME")
    print(f'write with it:   python generate.py --workdir {flags.out} --prompt "…"')
    print(f"mature it:       python train.py --init-from {flags.out} --workdir runs/NAME --data.source …")
    print("                 (its learning rate, noise and negatives follow from the weights; it prints what it chose)")


def run_export(flags: Export) -> None:
    """Exports, and says what was written."""
    if flags.max_shard_size <= 0:
        raise UserError(f"--max-shard-size must be positive, found {flags.max_shard_size}")
    if flags.adapter and load_config(Path(flags.workdir)).objective.kind == "tail":
        facts = export_tail(Path(flags.workdir), Path(flags.out))
        print(f"{flags.out}: a tail of {facts['numbers']:,} numbers in bfloat16, after {facts['step']} steps")
        return
    if flags.adapter:
        written = export_adapter(Path(flags.workdir), Path(flags.out))
        print(f"{flags.out}: a PEFT adapter of rank {written['r']} for {', '.join(written['target_modules'])}")
        return
    facts = export_weights(Path(flags.workdir), Path(flags.out), flags.dtype, int(flags.max_shard_size * 1e9))
    print(f"{flags.out}: {facts['model_type']}, {facts['num_parameters']:,} numbers in {facts['weights']} weights, "
          f"{facts['dtype']}")
    if facts["derived"]:
        print(f"made from the run's own parameters: {', '.join(facts['derived'])}")


def run_front(flags: Front) -> None:
    """Makes the workdir."""
    found = put_in_front(Path(flags.workdir), Path(flags.out), None if flags.source is None else Path(flags.source))
    print(f"{flags.out}: the model in {flags.workdir} with the tail in {found.folder}")
    print(f'write with it:   python generate.py --workdir {flags.out} --prompt "…" --show-tail')


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
             "tail": (Front, run_front), "sphere": (Sphere, run_sphere)}


def main(args: Sequence[str]) -> None:
    """Runs the command that `args` begin with."""
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if args else 2)
    if args[0] not in _COMMANDS:
        raise UserError(f"unknown command {args[0]!r}; there are {', '.join(_COMMANDS)}")
    kind, run = _COMMANDS[args[0]]
    run(parse(kind, args[1:], prog=f"python -m tokmat_jax hf {args[0]}"))
