"""Signals that ask a run to stop: the run finishes its step, saves and exits with a special code."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import jax

PREEMPTED = 4
"""Exit code of a run that one of the `ASKING` signals stopped and that has saved: the same command continues it."""

INTERRUPTED = 130
"""Exit code after Ctrl-C (SIGINT), as in shells. After one Ctrl-C the run has saved."""

ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop: pre-emption, a closed terminal, Slurm shortly before the time limit."""


class Stop:
    """The stop that was requested of a run, if any."""

    def __init__(self) -> None:
        self._code: int | None = None

    def after(self, step: int) -> int | None:
        """The exit code if the run must stop after `step`, else None. The step is the same in all processes; every
        process must call this."""
        if jax.process_count() == 1:
            return self._code
        from jax.experimental import multihost_utils

        return PREEMPTED if multihost_utils.reached_preemption_sync_point(step) else None

    def _heed(self, number: int) -> None:
        if number == signal.SIGINT and self._code == INTERRUPTED:
            # A clean exit would wait for pending saves. A progress bar may have hidden the cursor.
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
        """Handles the signals whose numbers arrive as bytes, until the other end is closed."""
        while numbers := heard.recv(64):
            for number in numbers:
                self._heed(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Context in which the `ASKING` signals and SIGINT ask the run to stop; a second SIGINT ends the process.

    A separate thread handles them, because the main thread may spend minutes in a compilation. If there are several
    processes, JAX listens for SIGTERM and tells all of them; the other signals are converted to SIGTERM. If SIGHUP was
    ignored before, as under `nohup`, it stays ignored. Outside the main thread no signals can be received.
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
    # Python writes to this file only the signals that have a handler.
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
