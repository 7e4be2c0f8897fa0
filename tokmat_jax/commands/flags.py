"""The command line: typed flags from dataclasses, configs from files, and one clear line for a mistake."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from tokmat_jax.commands import shipped
from tokmat_jax.config import Config
from tokmat_jax.config.adopt import FOLLOWING, adopt, follow, value_at
from tokmat_jax.distributed.processes import settle_jax
from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.output import logged_warnings, protect_output, warn_of_loss
from tokmat_jax.storage.workdir import CHECKPOINTS, CONFIG, load_config

T = TypeVar("T")
WITHOUT_PREFIX = tyro.conf.arg(name="")
"""Marks a section whose flags have no prefix: `generation: Annotated[GenerationConfig, WITHOUT_PREFIX]`."""


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line's arguments; a UserError becomes one line and exit code 2.

    Whatever becomes of standard output and standard error, `main` goes on (see `output.py`).
    """
    protect_output()
    _hide_closed_loops()
    try:
        for word in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise UserError(f"{shown(word)} is no UTF-8 text, which it must be: rename that file or folder")
        settle_jax()
        with logged_warnings("absl"):  # where Orbax logs
            main(sys.argv[1:])
        warn_of_loss()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith("Unable to initialize backend"):
            raise
        print(f"error: JAX finds no such device: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _hide_closed_loops() -> None:
    """Hides one error that nobody can catch: after a save has failed, Orbax's other arrays end without their loop."""
    show = sys.unraisablehook

    def shown(ignored: "sys.UnraisableHookArgs") -> None:
        if not (ignored.exc_type is RuntimeError and str(ignored.exc_value) == "Event loop is closed"):
            show(ignored)

    sys.unraisablehook = shown


def parse(
    kind: type[T], args: Sequence[str], default: T | None = None, description: str | None = None,
    prog: str | None = None,
) -> T:
    """Flags of the dataclass `kind`; raises UserError for an unknown flag (with the nearest) or a bad value."""
    texts, said = _text_flags(kind), io.StringIO()
    args = _joined(args, texts)
    start = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(kind, args=args, return_unknown_args=True, description=description,
                                       default=start, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = _one_line(said.getvalue())
        cures = [f"; for the text {word!r} write {flag}={word}" for flag, word in itertools.pairwise(args)
                 if flag in texts and f"Missing value for argument '{flag}'" in message and word.startswith("-")]
        raise UserError("".join([message, *cures[:1]])) from None
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        near = difflib.get_close_matches(flag, _flags(kind, default), 1, cutoff=0.5)
        raise UserError(f"unknown option {flag}" + (f"; nearest: {near[0]}" if near else "; see --help"))
    return parsed


def _joined(args: Sequence[str], text_flags: set[str]) -> list[str]:
    """`args` with `--flag=-text` for `--flag -text`, because a word of its own that begins with - counts as a flag.

    Only what looks like one, such as --stream or -h, goes on doing so.
    """
    joined: list[str] = []
    for word in args:
        is_text = word.startswith("-") and not re.fullmatch(r"-h|--[a-z][\w.-]*(=.*)?", word, re.DOTALL)
        if is_text and joined and joined[-1].replace("_", "-") in text_flags:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _text_flags(kind: type, prefix: str = "--") -> set[str]:
    """The flags of the dataclass `kind` that take any text."""
    found, marked = set(), get_type_hints(kind, include_extras=True)
    for name, hint in get_type_hints(kind).items():
        flag = flag_of(name, prefix)
        if dataclasses.is_dataclass(hint):
            inner = prefix if WITHOUT_PREFIX in get_args(marked[name]) else f"{flag}."
            found |= _text_flags(hint, inner)  # pyright: ignore[reportArgumentType]  (a type, no instance)
        elif str in (hint, *get_args(hint), *itertools.chain(*map(get_args, get_args(hint)))):
            found.add(flag)
    return found


def flag_of(name: str, prefix: str = "--") -> str:
    """The flag of a field: `tail_length` → `--tail-length`."""
    return prefix + name.replace("_", "-")


def given(kind: type, args: Sequence[str]) -> list[str]:
    """Fields of the dataclass `kind` whose flags, without a prefix, are among the words `args`; in the class's order.
    """
    named = {word.split("=", 1)[0].replace("_", "-") for word in args}
    return [one.name for one in dataclasses.fields(kind) if flag_of(one.name) in named]


def _flags(kind: type[T], default: T | None) -> list[str]:
    """All long flags of `kind`, read off its own help."""
    shown = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], default=start)
    return sorted(set(re.findall(r"--[a-z][a-z0-9.\-]*", shown.getvalue())))


def _one_line(box: str) -> str:
    """The message of tyro's box of several lines: what stands before its first inner rule.

    In a terminal the box is coloured, and where Unicode cannot be shown it is drawn in ASCII.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    message = []
    for line in plain.splitlines():
        inside = line.strip("│|+╭╮╰╯ ").strip()
        if line.strip() and line.strip()[0] not in "│|":
            continue  # the frame, with the title in it
        if inside and set(inside) <= {"─", "-"}:
            break
        message.append(inside)
    text = " ".join(filter(None, message)) or " ".join(plain.split())
    # A check of ours names the field by itself; tyro adds the section in which it failed.
    return re.sub(r"^Error parsing (?!--)[\w.]+: ", "", text)


def parse_config(args: Sequence[str]) -> Config:
    """The Config of `--config FILE` or `--config NAME` (or the defaults) with every other flag applied on top.

    With `--init-from WORKDIR`, or a file that sets `init_from`, the shape of that model and its tokenizer come too; a
    run that has begun from it has them in its own config, and needs it no more.
    """
    return parse_run(args)[0]


def parse_run(args: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """The Config of `parse_config`, and the settings in it that follow from the model of `--init-from` {name: value}.

    A flag, or a value of the file that is not the default, counts as given and is never changed.
    """
    args, followed = list(args), {}
    default = Config()
    if (path := value_of(args, "--config", remove=True)) is not None:
        default = load_config_file(path)
    path = value_of(args, "--init-from") or default.init_from
    description = "Train a model; start from a file with --config FILE.py, or from a shipped one with --config NAME."
    if path not in (None, "None"):
        own = _begun(Path(value_of(args, "--workdir") or default.workdir), path)
        source = own or load_config(Path(path))
        given_ones = [name for name in FOLLOWING if value_of(args, flag_of(name)) is not None
                      or value_at(default, name) != value_at(Config(), name)]
        # What the flags say counts already for what is adopted: a shorter window, another objective.
        mistake = None
        try:
            default = parse(Config, args, default, description)
        except UserError as error:  # it may be none any more with what is adopted
            mistake = error
        try:
            default = adopt(default, source, path, default.objective.kind)
        except UserError as error:
            raise mistake or error from None
        default, followed = follow(default, source, given_ones, begun=own is not None)
    return parse(Config, args, default, description), followed


def _begun(workdir: Path, init_from: str) -> Config | None:
    """The config of the run in `workdir`, if there is one that has a checkpoint and has begun from `init_from`."""
    has_begun = (workdir / CONFIG).is_file() and any((workdir / CHECKPOINTS).glob("[0-9]*"))
    own = load_config(workdir) if has_begun else None
    return own if own is not None and own.init_from == init_from else None


def value_of(args: list[str], flag: str, remove: bool = False) -> str | None:
    """What the command line gives `flag`, the last value if there are several; None if it is left out."""
    found = None
    for index, word in reversed([*enumerate(args)]):
        if word.split("=", 1)[0].replace("_", "-") == flag:
            value, used = (word.split("=", 1)[1], 1) if "=" in word else ("".join(args[index + 1 : index + 2]), 2)
            found = value if found is None else found
            if remove:
                del args[index : index + used]
    return found


def load_config_file(asked: str | Path) -> Config:
    """What `get_config()` of a Python file returns; `asked` is its path, or the name of a shipped config."""
    path = shipped.find(asked, ".py", "--config")
    try:
        made = runpy.run_path(str(path)).get("get_config", lambda: None)()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {path} cannot be run: {type(error).__name__}: {error}") from None
    if not isinstance(made, Config):
        raise UserError(f"--config: {path} must define get_config() that returns a tokmat_jax.config.Config")
    return made
