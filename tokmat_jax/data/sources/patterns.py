"""The files that `files:…` names: paths and patterns, with commas between them.

An existing path is taken literally, whatever characters are in its name. In a pattern, `*`, `?` and `[…]` match
characters of one name and `**` matches any folders in between; `[*]`, `[[]` and `[,]` match the character itself. A
path that cannot be read is an error: the text of a file that was silently skipped would never be learned.
"""

import contextlib
import fnmatch
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokmat_jax.errors import UserError, one_line


def find_files(text: str) -> list[Path]:
    """The files that `text` names, each once: in the order of its parts, those of a pattern sorted.

    Raises UserError if a part names no file, a folder, a broken link, or anything else that is not a regular file,
    or if a folder cannot be listed.
    """
    with _named_folders():
        found = (path for part in _parts(text) for path in _files_of(part))
        return list(_once(found))


@contextlib.contextmanager
def _named_folders() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        place = getattr(error, "filename", None)
        where = f"{place} cannot be read: " if place else ""
        raise UserError(f"data.source: {where}{getattr(error, 'strerror', None) or one_line(error)}") from None


def _parts(text: str) -> Iterator[str]:
    """The parts between commas. An existing path may have commas in its name."""
    words = re.split(r"(?<!\[),|,(?!\])", text)
    begin = 0
    while begin < len(words):
        ends = (len(words), *range(begin + 1, len(words)))
        end = next((end for end in ends if os.path.lexists(",".join(words[begin:end]))), begin + 1)
        yield ",".join(words[begin:end])
        begin = end


def _files_of(part: str) -> list[Path]:
    if os.path.isdir(part):
        raise UserError(f"data.source: {part!r} is a folder: name the files in it, as in {part.rstrip('/')}/*.txt or "
                        f"{part.rstrip('/')}/**/*.jsonl")
    if os.path.lexists(part):
        return [_regular(Path(part))]
    names = [name for name in part.split("/") if name]
    matches = sorted(Path(path) for path in _matches("/" if part.startswith("/") else "", names)
                     if not os.path.isdir(path))
    if not matches:
        raise UserError(f"data.source: no file matches {part!r}")
    return [_regular(path) for path in matches]


def _regular(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_symlink() and not path.exists():
        raise UserError(f"data.source: {path} is a link to {os.readlink(path)}, which does not exist: restore that "
                        f"file, or remove the link")
    raise UserError(f"data.source: {path} is no regular file: write its text into one, which can be read more than "
                    f"once")


def _once(paths: Iterable[Path]) -> Iterator[Path]:
    """Every file once, under the first of its names."""
    seen, folders = set(), {}
    for path in paths:
        if path.is_symlink():
            real = os.path.realpath(path)
        else:
            if path.parent not in folders:
                folders[path.parent] = os.path.realpath(path.parent)
            real = os.path.join(folders[path.parent], path.name)
        if real not in seen:
            seen.add(real)
            yield path


def _matches(folder: str, names: Sequence[str]) -> Iterator[str]:
    """Paths below `folder` that fit the `names`, a pattern for each level."""
    if not names:
        yield folder
        return
    name, rest = names[0], names[1:]
    if name == "**":
        for below in _tree(folder):
            yield from _matches(below, rest or ["*"])
    elif not re.search(r"[*?\[]", name):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path := os.path.join(folder, name))
            yield from _matches(path, rest)
    elif os.path.isdir(folder or "."):
        fits = re.compile(fnmatch.translate(name)).match
        for entry in sorted(os.listdir(folder or ".")):
            if fits(entry) and (name.startswith(".") or not entry.startswith(".")):
                yield from _matches(os.path.join(folder, entry), rest)


def _tree(folder: str) -> Iterator[str]:
    """`folder` and all folders below it except hidden ones, links included: each once, so no loop is followed."""
    seen, waiting = set(), deque([folder])
    while waiting:
        one = waiting.popleft()
        real = os.path.realpath(one or ".")
        if real in seen or not os.path.isdir(real):
            continue
        seen.add(real)
        yield one
        with os.scandir(one or ".") as entries:
            waiting.extend(sorted(os.path.join(one, entry.name) for entry in entries
                                  if entry.is_dir() and not entry.name.startswith(".")))
