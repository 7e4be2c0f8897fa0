"""Paths that a library cannot misread.

Orbax looks for its own files with the absolute path of a checkpoint as a pattern, TensorStore takes a backslash for a
slash, and both take `gs:/` for a bucket: in a folder with such a name weights are written that nothing reads again.
"""

import functools
import os
import re
from pathlib import Path

import jax

from tokmat_jax.errors import UserError

_MISREAD = re.compile(r"[*?\[\]\\\ud800-\udfff]|:/")


def plain_path(folder: Path) -> Path:
    """An absolute path of `folder`, which must exist, without characters that a library gives a meaning.

    Raises UserError if the system has no such path, or several processes would have to agree on one.
    """
    whole = folder.resolve()
    if not _MISREAD.search(f"{whole}/"):
        return whole
    facts = whole.stat()
    return _through_descriptor(whole, facts.st_dev, facts.st_ino)


@functools.cache
def _through_descriptor(folder: Path, _device: int, _inode: int) -> Path:
    """The folder by its open descriptor. It stays open: libraries keep what they read by path, so the number of one
    folder must not become that of another."""
    descriptor = os.open(folder, os.O_RDONLY)
    path = Path(f"/proc/self/fd/{descriptor}")
    if not path.is_dir() or jax.process_count() > 1:
        os.close(descriptor)
        raise UserError(f"{str(folder)!r} has one of * ? [ ] \\ :/ in its name, or bytes that are no text, which the "
                        f"checkpoint library misreads here: choose a folder without them")
    return path
