"""A run's folder: enough by itself to generate and to go on.

    config.json      the run's Config, as data
    corpus.json      what the corpus was made from; its fingerprint must not change
    tokenizer/       see `data/tokenizer.py`
    checkpoints/     see `checkpoint.py`
    damaged/         checkpoints that could not be read, moved aside
    metrics.jsonl    one row per logged step; `tensorboard/` holds the same
    samples.jsonl    what was printed during training
    spikes.jsonl     steps whose loss stood out or that were skipped, with the position of their batch
    lock             held by the process that trains
    imported.json    where the weights come from, if they were not trained here
"""

import dataclasses
import difflib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import pydantic

from tokmat_jax.config import Config
from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.storage.files import UNFINISHED, lock, read_json, write_json

CONFIG, CORPUS, TOKENIZER, CHECKPOINTS = "config.json", "corpus.json", "tokenizer", "checkpoints"
IMPORTED = "imported.json"
DAMAGED = "damaged"
LOCK = "lock"

_WRITTEN = (CONFIG, CORPUS, TOKENIZER, CHECKPOINTS, DAMAGED, LOCK, "metrics.jsonl", "tensorboard", "samples.jsonl",
            "spikes.jsonl", "profile")

_FREE = ("workdir", "mesh", "compute", "cluster", "generation", "data.source", "data.prepared_dir", "tokenizer.name",
         "train.num_steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.sample_every",
         "train.num_samples", "train.checkpoint_every", "train.keep_checkpoints", "train.max_skipped",
         "train.skip_batches", "train.profile")
"""Fields that a resumed run may change; any other would make it another run. Where text and tokenizer lie does not
matter: the fingerprint of the corpus tells what they are."""
_MOST_LAYERS, _LARGEST_SIZE = 1 << 12, 1 << 24


def save_config(config: Config, workdir: Path) -> None:
    """Writes `config` into `workdir`; a reader never sees half of it."""
    write_json(workdir / CONFIG, dataclasses.asdict(config))


def make_workdir(workdir: Path, flag: str = "--workdir") -> None:
    """Creates the folder that `flag` names; raises UserError where that, or writing into it, is not possible."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot write into {workdir}: {error.strerror}; choose another {flag}") from None


def lock_workdir(workdir: Path) -> IO[str]:
    """Keeps every other run out of `workdir` until the file that is returned is closed, or the process ends.

    Raises UserError if another process has it.
    """

    def in_use(holder: str) -> None:
        raise UserError(f"{workdir} is in use by {holder}: wait for it to end, or choose another --workdir")

    def warn(error: OSError) -> None:
        print(f"warning: {workdir} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)

    try:
        return lock(workdir / LOCK, in_use, warn)
    except OSError as error:
        raise UserError(f"--workdir: cannot write {workdir / LOCK}: {error.strerror}") from None


def refuse_links(workdir: Path) -> None:
    """Raises UserError where a link in `workdir` leads out of it: through it a run would write elsewhere."""
    whole = workdir.resolve()
    written = [path for path in whole.iterdir() if path.name.removesuffix(UNFINISHED) in _WRITTEN]
    for path in itertools.chain(written, *(path.rglob("*") for path in written)):
        if path.is_symlink() and not path.resolve().is_relative_to(whole):
            raise UserError(f"{path} is a link to {path.resolve()}, out of the workdir, where a run must not write: "
                            f"make the whole --workdir a link instead, which it may be")


def known_corpus(workdir: Path) -> dict[str, Any]:
    """The facts of the corpus that the run in `workdir` has learned from, with its `fingerprint`.

    Raises UserError if they are missing or damaged.
    """
    facts = read_json(workdir / CORPUS)
    if not isinstance(facts.get("fingerprint"), str):
        raise UserError(f"{workdir / CORPUS} is damaged: this run cannot tell which corpus it has learned from")
    return facts


def load_config(workdir: Path) -> Config:
    """The Config of a run; raises UserError where there is none, or one that is damaged or has unknown fields."""
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is no run: it has no {CONFIG}; train one with train.py --workdir {workdir}")
    try:
        return parse_config_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def parse_config_json(text: str, where: str) -> Config:
    """The Config in the JSON `text`; raises UserError, which names `where`, if it is damaged or does not fit."""
    try:
        _refuse_unknown(json.loads(text), Config, where)
        config = pydantic.TypeAdapter(Config).validate_json(text, strict=True)
        _refuse_giant(config, where)
        return config
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its values"
        raise UserError(f"{where}: {field}: {one_line(first['msg'])}") from None
    except (ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors too
        raise UserError(f"{where} is damaged: {one_line(error)}") from None


def _refuse_giant(config: Config, where: str) -> None:
    """A model's shape is worked out before its weights are looked for: what a file claims must stay within reason."""
    for name, value in dataclasses.asdict(config.model).items():
        most = _MOST_LAYERS if name == "num_layers" else _LARGEST_SIZE
        if type(value) is int and value > most:
            raise UserError(f"{where}: model.{name} = {shown(value)} is not supported; it must be at most {most}")


def _refuse_unknown(data: Any, kind: type, where: str) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise UserError(f"{where}: unknown field {shown(name)}" + (f"; nearest: {near[0]!r}" if near else ""))
        default = fields[name].default_factory
        if dataclasses.is_dataclass(default) and isinstance(default, type):
            _refuse_unknown(value, default, f"{where}: {name}")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted fields in which two configs differ → (old, new)."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}".strip(".")).items()}

    before, after = flat(dataclasses.asdict(old), ""), flat(dataclasses.asdict(new), "")
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def check_same_run(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that a resumed run changes; raises UserError if one of them would make it another run."""
    changed = differences(old, new)
    for name, (before, after) in changed.items():
        if not any(name == free or name.startswith(free + ".") for free in _FREE):
            raise UserError(f"{new.workdir} holds a run with {name} = {before!r}, this command has {after!r}: "
                            f"give the same value, or another --workdir")
    return changed
