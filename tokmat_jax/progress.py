"""Progress on standard error: a live bar in a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """The progress bar of a loop."""

    def __init__(self, name: str, total: float | None, start: int, progress: Progress | None, shown: bool = True):
        self._shown = shown
        self._name, self._total, self._start, self._progress = name, total, start, progress
        self._task = progress.add_task(name, total=total, completed=start, note="") if progress else None
        self._begin = self._last = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        """Reports that `done` of the total is finished; `note` is shown beside it."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif self._shown and (time.monotonic() - self._last > _SECONDS_BETWEEN_LINES or done == self._total):
            self._last = time.monotonic()
            of = f"/{self._total:,.0f}" if self._total else ""
            left = self._left(done)
            print(f"{self._name} {done:,.0f}{of}{'  ' + note if note else ''}{left}", file=sys.stderr, flush=True)

    def _left(self, done: float) -> str:
        if not self._total or done <= self._start:
            return ""
        spent = time.monotonic() - self._begin
        left = spent * (self._total - done) / (done - self._start)
        return f"  {int(left) // 60}:{int(left) % 60:02d} left" if done < self._total else f"  {spent:.0f} s"

    def print(self, *parts: object) -> None:
        """Prints above the bar, or to standard output if there is no bar."""
        if self._progress is not None:
            self._progress.console.print(*parts, soft_wrap=True)
        elif self._shown:
            Console(soft_wrap=True, highlight=False).print(*parts)


@contextmanager
def bar(name: str, total: float | None = None, start: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A progress bar called `name`. `total` is None if the end is unknown; `start` is what was done before.

    If not `shown`, it prints nothing.
    """
    console = Console(stderr=True, highlight=False)
    if not shown or not console.is_terminal:
        yield Bar(name, total, start, None, shown)
        return
    columns: list[str | ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=24)]
    if total is not None:
        columns += ["{task.completed:,.0f}/{task.total:,.0f}"]
    columns += [TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
    if total is not None:
        columns += [TextColumn("· left"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        yield Bar(name, total, start, progress)
