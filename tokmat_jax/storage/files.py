"""Files that are written atomically, JSON objects, and the lock that keeps other processes out."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tokmat_jax.errors import UserError, one_line, refusal

UNFINISHED = ".unfinished"
"""Suffix of a file that is still being written."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces a file atomically: no reader of `path` sees half of it. Raises OSError if this fails."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes an object as `write_whole` does."""
    write_whole(path, f"{json.dumps(data, indent=2)}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return found


@contextlib.contextmanager
def appears_whole(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `folder` at the end; if the block fails, nothing is left.

    Raises UserError if `folder` exists and is not empty, or cannot be created.
    """
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise UserError(f"{folder} already exists: choose another place, or delete it first")
    unfinished = folder.parent / f".{folder.name}{UNFINISHED}-{os.getpid()}"
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


def lock(path: Path, if_held: Callable[[str], None], if_refused: Callable[[OSError], None] | None = None) -> IO[str]:
    """Locks the file at `path` against other processes, until the returned file is closed or this process ends.

    If another process holds the lock, `if_held` is called once with what that process wrote about itself. It may raise;
    otherwise, this waits for the lock. If the file system has no locks, `if_refused` is called and the file is returned
    without one. Raises OSError if the file cannot be written, or cannot be locked and `if_refused` is None.
    """
    waits = False
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if not waits and (waits := not _locked_at_once(file)):
                if_held(_holder(file))
            if waits:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if if_refused is None:
                file.close()
                raise
            if_refused(error)
        except BaseException:
            file.close()
            raise
        if _is_at(path, file):
            _sign(file)
            return file
        file.close()


def _locked_at_once(file: IO[str]) -> bool:
    """Locks the file, and returns whether that was possible: False if another process holds its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: IO[str]) -> bool:
    """False if the holder has removed its file: other processes then no longer find the locked file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return one_line(file.read(200) or "another process")


def _sign(file: IO[str]) -> None:
    """Writes who holds the lock into its file. On a full disk this is left out; the lock itself still holds."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
