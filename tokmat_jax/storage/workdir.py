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

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tokmat_jax.config import Config
from tokmat_jax.config.saved import parse_config_json
from tokmat_jax.errors import UserError, one_line, refusal

CONFIG, CORPUS, TOKENIZER, CHECKPOINTS = "config.json", "corpus.json", "tokenizer", "checkpoints"
IMPORTED = "imported.json"
DAMAGED = "damaged"
LOCK = "lock"

_WRITTEN = (CONFIG, CORPUS, TOKENIZER, CHECKPOINTS, DAMAGED, LOCK, "metrics.jsonl", "tensorboard", "samples.jsonl",
            "spikes.jsonl", "profile")


def save_config(config: Config, workdir: Path) -> None:
    """Writes `config` into `workdir`; a reader never sees half of it."""
    write_json(workdir / CONFIG, dataclasses.asdict(config))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes an object; a reader of `path` never sees half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(unfinished, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return found


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

    Raises UserError where another process has it.
    """
    try:
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir: cannot write {workdir / LOCK}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = one_line(file.read(200) or "another process")
        file.close()
        raise UserError(f"{workdir} is in use by {holder}: wait for it to end, or choose another --workdir") from None
    except OSError as error:
        print(f"warning: {workdir} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
    with contextlib.suppress(OSError):  # the lock is what counts; a full disk takes no name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def refuse_links(workdir: Path) -> None:
    """Raises UserError where a link in `workdir` leads out of it: through it a run would write elsewhere."""
    whole = workdir.resolve()
    written = [path for path in whole.iterdir() if path.name.removesuffix(".unfinished") in _WRITTEN]
    for path in itertools.chain(written, *(path.rglob("*") for path in written)):
        if path.is_symlink() and not path.resolve().is_relative_to(whole):
            raise UserError(f"{path} is a link to {path.resolve()}, out of the workdir, where a run must not write: "
                            f"make the whole --workdir a link instead, which it may be")


@contextlib.contextmanager
def appears_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` at the end; where that is not reached, nothing is left.

    Raises UserError where `folder` exists and is not empty, or cannot be made.
    """
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise UserError(f"{folder} already exists: choose another place, or delete it first")
    unfinished = folder.parent / f".{folder.name}.unfinished-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder.parent}: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.rename(folder)
    except OSError as error:
        raise refusal(error, f"cannot write {folder}", unfinished) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
