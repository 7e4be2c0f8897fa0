"""Arrays in untrusted files: the size that a header claims is checked against the file before it is allocated."""

import contextlib
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokmat_jax.errors import UserError, one_line

_UNPACKED = 64 << 20
"""Bytes that any `.npz` may unpack to, whatever its size."""
_RATIO = 100
"""A larger `.npz` may unpack to this many times its own size: numbers computed by a model hardly compress."""

# Exceptions that zip, its compression and NumPy's own format raise for damaged files.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, ArithmeticError,
           SyntaxError, RecursionError, MemoryError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences NumPy's warnings about headers that only damaged files have."""
    with warnings.catch_warnings(), np.errstate(over="raise"):
        warnings.simplefilter("ignore")
        yield


def open_npy(path: str | Path) -> np.ndarray:
    """The numbers of an `.npy` file, mapped into memory: only the parts that are used are read.

    Raises UserError if the file is missing, is something else, holds anything but numbers, or is shorter than its
    header says.
    """
    try:
        with _quiet():
            found = np.lib.format.open_memmap(path, "r")
    except _DAMAGE as error:
        raise UserError(f"{path} is no .npy file of numbers: {one_line(error)}") from None
    if found.dtype.kind not in "biuf":
        raise UserError(f"{path} is no .npy file of numbers: it holds {found.dtype}")
    return found


def read_npz(
    path: str | Path, names: Sequence[str], what: str, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of numbers called `names` in an `.npz` file; those that are `optional` may be missing.

    Raises UserError, saying that it is no `what`, if the file is missing or damaged, or claims to unpack to far more
    than its own size.
    """
    try:
        with zipfile.ZipFile(path) as archive, _quiet():
            stored = set(archive.namelist())
            names = [name for name in names if name not in optional or f"{name}.npy" in stored]
            members = [archive.getinfo(f"{name}.npy") for name in names]
            most = max(_UNPACKED, _RATIO * Path(path).stat().st_size)
            if (size := sum(member.file_size for member in members)) > most:
                raise UserError(f"{path} is no {what}: it would unpack to {size:,} bytes, more than {_RATIO} times its "
                                f"own size")
            return {name: _member(archive, member) for name, member in zip(names, members, strict=True)}
    except _DAMAGE as error:
        raise UserError(f"{path} is no {what}: {one_line(error)}") from None


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed in a way that NumPy does not use")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} has the format {version}, known are 1.0 and 2.0")
        read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0) else
                       np.lib.format.read_array_header_2_0)
        shape, _, dtype = read_header(stream)
        # The stream yields at most `file_size` bytes, so no larger array is ever created.
        if dtype.kind not in "biuf" or min(shape, default=0) < 0 \
                or math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError(f"{member.filename} does not hold the numbers that its header says, {dtype} {shape}")
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False)
