"""Standard output and standard error of the scripts: writing to them never fails, so no work is lost.

Plain writes fail if the reader exits (`| head`, or Ctrl-C, which ends `| tee` too), the disk is full, the terminal is
closed, or the encoding has no ×. With this module, everything that prints in the process, rich and the libraries
included, continues: what cannot be written is dropped, what cannot be encoded is replaced.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

from tokmat_jax.errors import UserError, one_line

UNREAD = 141
"""Exit code of a command that ends because nobody reads its output: the code that shells report for SIGPIPE."""


class _Descriptor(io.RawIOBase):
    """A file descriptor whose writes never fail; `failure` is the error that last made it drop data.

    Every write is attempted, since a full disk may have room again.
    """

    def __init__(self, number: int):
        self._number = number
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def _write_some(self, data: memoryview) -> int:
        """Number of bytes written. If the descriptor is full and does not block, waits and returns 0."""
        try:
            return os.write(self._number, data)
        except BlockingIOError:
            select.select((), (self._number,), ())
            return 0


_stdout: _Descriptor | None = None


def protect_output() -> None:
    """Makes writing to `sys.stdout` and `sys.stderr` never fail. Streams that were already replaced are left alone.

    A closed descriptor becomes /dev/null. Otherwise the next file to be opened would get its number, and messages of a
    C++ library to standard error would end up in a checkpoint.
    """
    global _stdout
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
    if null > 2:
        os.close(null)
    if sys.stdout is sys.__stdout__:
        sys.stdout, _stdout = _protected(sys.stdout, "replace")
    if sys.stderr is sys.__stderr__:
        # As Python does for standard error: a file name in a message can still be recognised.
        sys.stderr, _ = _protected(sys.stderr, "backslashreplace")


def _protected(stream: TextIO | None, errors: str) -> tuple[TextIO, _Descriptor]:
    # If there is no stream, its number may belong to a file that was opened earlier.
    raw = _Descriptor(os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno())
    encoding = "utf-8" if stream is None else stream.encoding
    by_line = isinstance(stream, io.TextIOWrapper) and (stream.line_buffering or stream.write_through)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line), raw


def _lost() -> OSError | None:
    """The error that made standard output lose data, or None if nothing has been lost so far."""
    sys.stdout.flush()
    return None if _stdout is None else _stdout.failure


def stop_unless_read() -> None:
    """Ends a command whose only result is its output, if that output could not be written.

    If the reader has gone, exits silently with the code `UNREAD`; for any other failure, raises UserError.
    """
    if (error := _lost()) is None:
        return
    if error.errno == errno.EPIPE:
        sys.exit(UNREAD)
    raise UserError(f"cannot write to standard output: {error.strerror}")


def warn_of_loss() -> None:
    """Warns on standard error if some of the output is lost, unless its reader went away."""
    error = _lost()
    if error is not None and error.errno != errno.EPIPE:
        print(f"warning: not all of standard output could be written ({error.strerror})", file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    """Prints the warnings that a library logs as lines of ours; immediate repetitions are printed once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        said, self._last = self._last, one_line(record.getMessage())
        if self._last != said:
            print(f"warning: {self._last}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def logged_warnings(name: str) -> Iterator[None]:
    """Inside the block, warnings of the logger `name` appear only as lines on standard error."""
    logger, lines = logging.getLogger(name), _Lines()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.propagate = propagate


@contextlib.contextmanager
def without_torch_notice() -> Iterator[None]:
    """Silences a notice during the import of `transformers`: that PyTorch is not installed. Nothing here needs it."""
    logger = logging.getLogger("transformers")

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("PyTorch was not found")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
