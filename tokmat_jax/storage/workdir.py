"""A run's folder, which is all that is needed to generate or to resume.

    config.json      the run's Config, as data
    corpus.json      what the corpus was made from; the fingerprint must not change
    tokenizer/       see `data/tokenizer.py`
    checkpoints/     see `checkpoint.py`
    damaged/         checkpoints that could not be read, moved aside
    metrics.jsonl    one row per logged step; `tensorboard/` holds the same
    samples.jsonl    samples that were printed during training
    spikes.jsonl     steps whose loss stood out or that were skipped, with the position of their batch
    lock             held by the process that trains
    imported.json    source of the weights, if they were not trained here
"""

import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from tokmat_jax.config import Config
from tokmat_jax.config.saved import parse_config_json
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.storage.files import UNFINISHED, lock, read_json, write_json

CONFIG, CORPUS, TOKENIZER, CHECKPOINTS = "config.json", "corpus.json", "tokenizer", "checkpoints"
IMPORTED = "imported.json"
BASE = "base.json"
DAMAGED = "damaged"
LOCK = "lock"

_WRITTEN = (CONFIG, CORPUS, TOKENIZER, CHECKPOINTS, DAMAGED, LOCK, "metrics.jsonl", "tensorboard", "samples.jsonl",
            "spikes.jsonl", "profile")


def save_config(config: Config, workdir: Path) -> None:
    """Writes `config` into `workdir` atomically."""
    write_json(workdir / CONFIG, dataclasses.asdict(config))


def make_workdir(workdir: Path, flag: str = "--workdir") -> None:
    """Creates the folder that `flag` names; raises UserError if it cannot be created or written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"{flag}: cannot write into {workdir}: {error.strerror}; choose another {flag}") from None


def lock_workdir(workdir: Path) -> IO[str]:
    """Keeps every other run out of `workdir` until the returned file is closed or the process ends.

    Raises UserError if another process holds the lock.
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
    """Raises UserError if a link in `workdir` leads out of it: a run would write elsewhere through the link."""
    whole = workdir.resolve()
    written = [path for path in whole.iterdir() if path.name.removesuffix(UNFINISHED) in _WRITTEN]
    for path in itertools.chain(written, *(path.rglob("*") for path in written)):
        if path.is_symlink() and not path.resolve().is_relative_to(whole):
            raise UserError(f"{path} is a link to {path.resolve()}, outside the workdir, where a run must not write: "
                            f"make the whole --workdir a link instead")


def known_corpus(workdir: Path) -> dict[str, Any]:
    """The facts of the corpus that the run in `workdir` was trained on, with its `fingerprint`.

    Raises UserError if they are missing or damaged.
    """
    facts = read_json(workdir / CORPUS)
    if not isinstance(facts.get("fingerprint"), str):
        raise UserError(f"{workdir / CORPUS} is damaged: it no longer says which corpus this run was trained on")
    return facts


def load_config(workdir: Path) -> Config:
    """The Config of a run; raises UserError if it is missing or damaged, or has unknown fields."""
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not a run directory: {CONFIG} is missing; train a model with train.py "
                        f"--workdir {workdir}")
    try:
        return parse_config_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
