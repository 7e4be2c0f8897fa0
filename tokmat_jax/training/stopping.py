"""Signals that ask a run to stop: it finishes its step, saves and leaves with a code that says so."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import jax

PREEMPTED = 4
"""Exit code of a run that was asked to stop by one of `ASKING` and has saved: the same command goes on."""

INTERRUPTED = 130
"""Exit code after Ctrl-C (SIGINT), as shells have it; after the first one the run has saved."""

ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop: a pre-emption, a terminal that is closed, Slurm before the time is up."""


class Stop:
    """What a run was asked for."""

    def __init__(self) -> None:
        self._code: int | None = None

    def after(self, step: int) -> int | None:
        """The exit code where the run is to stop behind `step`, the same step in all processes; every one must ask."""
        if jax.process_count() == 1:
            return self._code
        from jax.experimental import multihost_utils

        return PREEMPTED if multihost_utils.reached_preemption_sync_point(step) else None

    def _heed(self, number: int) -> None:
        if number == signal.SIGINT and self._code == INTERRUPTED:
            # A clean end would wait for what is being saved. The cursor may be hidden behind a progress bar.
            print("\x1b[?25h" * sys.stderr.isatty() + "left at once", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        if number == signal.SIGINT:
            self._code = INTERRUPTED
            print("stopping after this step, to save it; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        elif number in ASKING and self._code is None:
            self._code = PREEMPTED
            print("asked to stop: saving after this step", file=sys.stderr, flush=True)
        else:
            return
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def listen(self, heard: socket.socket) -> None:
        """Heeds the signals whose numbers arrive as bytes, until the other end is closed."""
        while numbers := heard.recv(64):
            for number in numbers:
                self._heed(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """While it lasts `ASKING` and SIGINT ask the run to stop, and a second SIGINT ends the process.

    They are heeded in a thread of their own: the main one may be deep in a compilation for minutes. Of several
    processes JAX hears SIGTERM, and tells all of them; the other signals are turned into it. A SIGHUP that is ignored
    stays so, as under `nohup`. Outside the main thread nothing can be heard.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    mouth, ear = socket.socketpair()
    mouth.setblocking(False)
    numbers = {signal.SIGINT, *ASKING}
    if jax.process_count() > 1:
        numbers.remove(signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    # Python tells a file of the signals for which it has a handler.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    other = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=stop.listen, args=(ear,), daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(other)
        for number, handler in before.items():
            signal.signal(number, handler)
        mouth.close()
        listener.join()
        ear.close()
