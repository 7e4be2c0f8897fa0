"""Digests of the content of files, each computed once.

Known digests are in a record beside the prepared corpora, one line for each file and state of it. A file is read again
only if its path, its size or one of its times has changed. Several processes may append to the record at once; damaged
lines are ignored.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokmat_jax.errors import UserError, one_line
from tokmat_jax.progress import bar

RECORD = "known-files.jsonl"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
"""Suffixes of files beside a tokenizer that are not part of it."""
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time identifies its state: within the clock's resolution it could change again."""

_State = tuple[str, int, int, int]
"""Real path, size, times of the last change of content and of anything (ns)."""


def digests(paths: Sequence[Path], folder: Path) -> list[str]:
    """The SHA-256 of each of the files; uses the record in `folder`, which need not exist.

    Raises UserError if one of them cannot be read, or changes while it is read.
    """
    known = dict(_read(folder / RECORD))
    found, total = [], len(paths)
    with bar("reading what the files hold", total) as progress:
        for number, path in enumerate(paths, 1):
            with reading(path):
                state = _state(path)
                if state not in known:
                    known[state] = _digest(path, state)
                    _append(folder / RECORD, state, known[state])
                    if number < total:
                        progress.update(number)
            found.append(known[state])
    return found


def folder_digests(folder: Path, known_in: Path) -> dict[str, str]:
    """The SHA-256 of each file in `folder` except weights, by name; uses the record in `known_in`, raises as
    `digests`."""
    with reading(folder):
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
    return {path.name: digest for path, digest in zip(files, digests(files, known_in), strict=True)}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def _state(path: Path) -> _State:
    facts = path.stat()
    return os.path.realpath(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _digest(path: Path, state: _State) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if _state(path) != state:
        raise UserError(f"{path} changes while it is read: wait until it is written, then start again")
    return found


def _check(facts: list[str | int]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read(record: Path) -> Iterator[tuple[_State, str]]:
    with contextlib.suppress(OSError), record.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                check, *facts = json.loads(line)
                if check == _check(facts):
                    path, size, changed, touched, digest = facts
                    yield (path, size, changed, touched), digest


def _append(record: Path, state: _State, digest: str) -> None:
    """Adds a line to the record. A failure does no harm: the file is then read again."""
    if max(state[2:]) > time.time_ns() - _SETTLED:
        return
    facts = [*state, digest]
    # The leading line break ends a truncated line before it. A single write keeps other processes' lines apart.
    line = f"\n{json.dumps([_check(facts), *facts])}\n".encode()
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("ab", buffering=0) as file:
            file.write(line)
