"""Checks the output files of a command before anything is computed."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokmat_jax.errors import UserError


def numbered(path: str, index: int, total: int) -> Path:
    """`path` itself if `total` is 1; else with a number from 1 before its suffix: `replay-2.html`."""
    whole = Path(path)
    return whole if total == 1 else whole.with_name(f"{whole.stem}-{index + 1}{whole.suffix}")


@contextlib.contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Raises UserError if the file that `flag` names cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}: cannot write {path}: {error.strerror}") from None


def check_files(written: Mapping[str, Sequence[Path]], read: Mapping[str, str | None]) -> None:
    """Raises UserError unless all files can be written, all are different, and none of them is also `read`.

    Both arguments map flags to files. Existing files are not changed.
    """
    sources = {_identity(Path(path)): flag for flag, path in read.items() if path is not None}
    seen: dict[tuple[int, int] | str, str] = {}
    for flag, paths in written.items():
        for path in paths:
            with writing(flag, path):
                one = _identity(path)
                if one in seen:
                    raise UserError(f"{seen[one]} and {flag} would write the same file {path}")
                if one in sources:
                    raise UserError(f"{flag} would overwrite {path}, which {sources[one]} reads: name another file")
                seen[one] = flag
                _try(flag, path)


def _identity(path: Path) -> tuple[int, int] | str:
    """An identity that is equal for all names of a file: other spellings, links and hard links."""
    if path.is_file():
        found = path.stat()
        return found.st_dev, found.st_ino
    # A terminal may be both read and written: identify it by the name that was given.
    return os.path.realpath(path) if not path.exists() else str(path.absolute())


def _try(flag: str, path: Path) -> None:
    """Raises UserError or OSError unless `path` can be written; leaves files and links as they were."""
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder")
    if path.exists() and not path.is_file():
        return  # a pipe or a device: opening and closing it would end its reader
    # If the path is a link to a missing file, try the file.
    target = Path(os.path.realpath(path))
    exists = target.exists()
    with target.open("ab"):
        pass
    if not exists:
        target.unlink()
