"""Paths that a library cannot misread.

Orbax searches for its own files with the absolute path of a checkpoint as a pattern, TensorStore reads a backslash as a
slash, and both read `gs:/` as a bucket. In a folder with such a name, weights would be written that cannot be read
again.
"""

import functools
import os
import re
from pathlib import Path

import jax

from tokmat_jax.errors import UserError

_MISREAD = re.compile(r"[*?\[\]\\\ud800-\udfff]|:/")


def plain_path(folder: Path) -> Path:
    """An absolute path of `folder`, which must exist, without characters that have a special meaning for a library.

    Raises UserError if the system has no such path, or several processes would have to agree on one.
    """
    whole = folder.resolve()
    if not _MISREAD.search(f"{whole}/"):
        return whole
    facts = whole.stat()
    return _through_descriptor(whole, facts.st_dev, facts.st_ino)


@functools.cache
def _through_descriptor(folder: Path, _device: int, _inode: int) -> Path:
    """The path of a folder through its open descriptor. The descriptor stays open: libraries cache what they read by
    path, so its number must not be reused for another folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    path = Path(f"/proc/self/fd/{descriptor}")
    if not path.is_dir() or jax.process_count() > 1:
        os.close(descriptor)
        raise UserError(f"{str(folder)!r} has one of * ? [ ] \\ :/ in its name, or bytes that are no text, which the "
                        f"checkpoint library misreads here: choose a folder without them")
    return path
