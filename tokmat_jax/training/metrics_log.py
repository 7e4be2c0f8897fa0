"""Writes metrics as JSON lines and TensorBoard events. A resumed run removes the rows that it will write again.

A full disk does not stop a run: rows wait in memory until there is space.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tokmat_jax.errors import UserError
from tokmat_jax.storage.files import write_whole


class JsonLines:
    """A file of one JSON object per line, each with a `step`. Opening it drops the rows after `resume_step`."""

    def __init__(self, path: Path, resume_step: int):
        self._path, self._waiting, self._warned = path, b"", False
        try:
            _keep_until(path, resume_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def write(self, row: dict[str, Any]) -> None:
        """Appends `row`; if this fails, the row is written together with the next one."""
        self._waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                _warn(self._path, error, "its rows wait until there is space")
            self._warned = True

    def close(self) -> None:
        self._flush()
        self._file.close()
        if self._waiting:
            print(f"warning: {self._path} lacks its last {self._waiting.count(10)} row(s)", file=sys.stderr, flush=True)


def _keep_until(path: Path, resume_step: int) -> None:
    before = path.read_bytes() if path.exists() else b""
    kept = b"".join(line + b"\n" for line in before.split(b"\n") if _step(line) <= resume_step)
    if kept != before or not path.exists():
        write_whole(path, kept)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # the last line of a killed run
        return float("inf")


def _warn(path: Path, error: OSError, then: str) -> None:
    print(f"warning: cannot write {path} ({error.strerror or error}): {then}", file=sys.stderr, flush=True)


class _Board:
    """Scalars for TensorBoard. Scalars that cannot be written are dropped: `metrics.jsonl` has all of them."""

    def __init__(self, folder: Path, resume_step: int):
        self._folder, self._purge, self._warned = folder, resume_step + 1, False
        self._events: Any = None
        self._suffix = ""

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (made when imported)
        from tensorboardX.summary import scalar

        try:
            if self._events is None:
                self._events = self._open()
            for name, value in values.items():
                self._events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            self._events.flush()
            self._purge = step + 1
        except OSError as error:
            if not self._warned:
                _warn(self._folder, error, "its curves have a gap")
            self._warned = True
            self._begin_again()

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._folder.mkdir(exist_ok=True)
        self._suffix = f".{time.time_ns()}"  # two files created in the same second would have the same name
        # An absolute path is never mistaken for an address such as `gs:/`.
        events = EventsWriter(str(self._folder.absolute() / "events"), self._suffix)
        # Events that an earlier process wrote from this step on no longer count.
        events.write_event(Event(step=self._purge, session_log=SessionLog(status=SessionLog.START)))
        return events

    def _begin_again(self) -> None:
        """Starts a new file after half a record was written, because it would hide all later records."""
        self.close()
        self._events = None
        for path in self._folder.glob(f"*{self._suffix}"):
            if path.stat().st_size == 0:
                path.unlink()

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir."""

    def __init__(self, workdir: Path, resume_step: int):
        self._rows = JsonLines(workdir / "metrics.jsonl", resume_step)
        self._board = _Board(workdir / "tensorboard", resume_step)

    def write(self, step: int, prefix: str, metrics: dict[str, float]) -> None:
        """Writes one row; each name gets the prefix `prefix/`."""
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._rows.write({"step": step, **named})
        self._board.write(step, named)

    def close(self) -> None:
        self._rows.close()
        self._board.close()
