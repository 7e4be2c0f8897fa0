"""Worker processes for the making of a corpus."""

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
    """A `map` whose results come as they are ready: in this process, or in several that end with the block.

    Raises UserError if a worker dies.
    """
    if workers <= 1:
        yield map
        return
    # Not forked: a fork takes the threads' locks with it, of the tokenizers and of JAX.
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
        raise UserError(f"one of {workers} workers died, most likely for want of memory: what is finished is kept, "
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
    """Ends this process when the other end of `parent` is closed, as it is when that process is killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)
