"""Worker processes for making a corpus."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from tokmat_jax.errors import UserError


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]]:
    """Yields a `map` that returns results as they are ready, from this process or from several that end with the block.

    Raises UserError if a worker dies.
    """
    if workers <= 1:
        yield map
        return
    # Not forked: a fork would copy the locks of the threads of tokenizers and JAX.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))

    def run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for future in as_completed([executor.submit(function, job) for job in jobs]):
            yield future.result()

    try:
        yield run
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError(f"one of {workers} workers died, most likely because memory ran out: finished work is kept, "
                        f"run it again with fewer --workers") from None
    finally:
        ours.close()
        executor.shutdown(cancel_futures=True)
        theirs.close()


def _start_worker(parent: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Connection) -> None:
    """Ends this process when the other end of `parent` is closed, which also happens if that process is killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)
