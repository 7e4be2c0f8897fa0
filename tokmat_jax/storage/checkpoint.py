"""Checkpoints through Orbax: parameters, optimiser and data position as separate items of one step.

Generation reads the parameters alone. Saving is asynchronous; a step is listed only when all its items are complete.
Nothing in a checkpoint depends on the mesh or on the number of processes that wrote it. The item `data` describes the
arrays (see `integrity.py`), so damage is found in whichever file it is. A process reads part of the first checkpoint
that it writes back at once: if checkpoints cannot be read, this must not be found out after days.
"""

import contextlib
import gc
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tokmat_jax.distributed.processes import everywhere, leave_broken_cluster, on_first
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.model.backbone import Params
from tokmat_jax.model.params import TrainState
from tokmat_jax.storage.integrity import describe, is_sealed, seal, summed
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.storage.workdir import CHECKPOINTS, DAMAGED

RETRY_SECONDS = 30.0
"""Minimum delay in seconds before a failed save is retried."""

LAST_RETRIES = 20
"""Number of retries for the final save."""


_MACHINE = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED", "Out of memory",
            "Permission denied", "Cannot allocate memory", "Too many open files", "Input/output error",
            "Stale file handle")
"""Words in error messages that are caused by the machine, not by the file."""


_RAISED_TOO = ("_SignalingThread.run() raised an exception", "Save Finalize thread", "Checkpointer failed",
               "Failed to write metadata", "Failed to update metadata", "Failed to run")
"""Errors that Orbax both logs with a traceback and raises; a failed save logs up to ten of them."""


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record of Orbax or its event loop says more than the exception that we catch and report."""
    if record.name == "asyncio":  # after a save or a read has failed, the other arrays fail too
        return "exception was never retrieved" not in record.getMessage()
    return not (record.exc_info and any(words in str(record.msg) for words in _RAISED_TOO))


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


class _DamageError(Exception):
    """The files of a checkpoint are damaged; the message says how."""


def _open_manager(
    workdir: Path, options: ocp.CheckpointManagerOptions, params: ocp.StandardCheckpointHandler | None = None
) -> ocp.CheckpointManager:
    handlers = {
        "params": params or ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    if options.create:
        workdir.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(plain_path(workdir) / CHECKPOINTS, options=options, item_handlers=handlers)


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int):
        self._workdir, self._keep = workdir, keep
        self._manager = self._open()
        self._failed_at: float | None = None
        self._proved = False

    def _open(self) -> ocp.CheckpointManager:
        """Opens a manager, after removing half-written checkpoints: Orbax would remove them in the background."""
        on_first(self._clean_up)
        return _open_manager(self._workdir, ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True))

    def _clean_up(self) -> None:
        for unfinished in (self._workdir / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def latest_step(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: int) -> None:
        """Starts saving `state` and the `position` in the data; returns before it is on disk.

        Only the first save is waited for; raises UserError if what is then on disk cannot be read. If saving fails, a
        warning is printed and `due` asks for another attempt; if there are several processes, all end instead.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        items = {"params": state.params, "optimizer": optimizer}
        facts = seal({"step": step, "position": position, "arrays": summed(items)})
        args = ocp.args.Composite(params=ocp.args.StandardSave(state.params),
                                  optimizer=ocp.args.StandardSave(optimizer), data=ocp.args.JsonSave(facts))

        def write() -> None:
            _check_room(Path(self._manager.directory), sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
            self._manager.save(step, args=args)

        self._attempt(write)
        if not self._proved and self._failed_at is None:
            self._attempt(self._manager.wait_until_finished)
            if self.latest_step() == step:
                _prove(self._manager, step, items)
                self._proved = True

    def due(self) -> bool:
        """Whether the last save failed and it is time for another attempt."""
        if self._failed_at is None and not self._manager.is_saving_in_progress():
            self._attempt(self._manager.wait_until_finished)
        if self._failed_at is not None:
            self._clean_up()  # what was still being written when the attempt failed
        return self._failed_at is not None and time.monotonic() >= self._failed_at + RETRY_SECONDS

    def finish(self, state: TrainState, position: int) -> None:
        """Saves, and returns when it is on disk; raises UserError if it cannot be written after all retries."""
        for attempt in range(1 + LAST_RETRIES):
            if attempt:
                time.sleep(RETRY_SECONDS)
            self.save(state, position)
            if self._failed_at is None:
                self._attempt(self._manager.wait_until_finished)
            if self.latest_step() == int(state.step):
                return
        raise UserError(f"step {int(state.step)} could not be saved in {self._workdir}, see above; {self._newest()}: "
                        f"make room there and run the same command again")

    def newest(self) -> str:
        """Waits until everything saved is on disk, and describes the newest checkpoint in words."""
        self._attempt(self._manager.wait_until_finished)
        return self._newest()

    def _newest(self) -> str:
        step = self.latest_step()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"

    def _attempt(self, write: Callable[[], Any]) -> None:
        self._failed_at = None
        try:
            write()
        except Exception as error:
            if jax.process_count() > 1:
                leave_broken_cluster(f"cannot save a checkpoint ({one_line(error)})")
            # A manager cannot be used after a failure. Before a new one is opened, half-written files are removed.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()
            self._failed_at = time.monotonic()
            print(f"warning: cannot save a checkpoint in {self._workdir} ({one_line(error)}); {self._newest()}, and "
                  f"saving is retried", file=sys.stderr, flush=True)

    def restore(self, shapes: TrainState) -> tuple[TrainState, int]:
        """The newest state that is not damaged, placed as `shapes` says, and its position in the data.

        Damaged checkpoints newer than it are moved aside, with a warning for each. Raises UserError if no checkpoint
        can be read, if the machine is at fault and not the files, or if the names, shapes or types are not those of
        `shapes`; nothing is moved then.
        """
        expected = {"params": shapes.params, "optimizer": {"step": shapes.step, "opt_state": shapes.opt_state}}
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, position = _read(self._manager, step, expected)
            except _DamageError as damage:
                damaged[step] = str(damage)
                continue
            on_first(lambda step=step: self._move_aside(damaged, step))
            self._manager.reload()
            optimizer = found["optimizer"]
            return TrainState(optimizer["step"], found["params"], optimizer["opt_state"]), position
        reasons = "; ".join(f"{step} is damaged ({reason})" for step, reason in damaged.items())
        raise UserError(f"no checkpoint in {self._workdir / CHECKPOINTS} can be read: {reasons}: restore one from a "
                        f"backup, or start again in another --workdir")

    def _move_aside(self, damaged: dict[int, str], good: int) -> None:
        checkpoints, folder = self._workdir / CHECKPOINTS, self._workdir / DAMAGED
        for step, reason in damaged.items():
            folder.mkdir(exist_ok=True)
            place = next(place for number in range(10**6)
                         if not (place := folder / (f"{step}-{number}" if number else str(step))).exists())
            os.rename(checkpoints / str(step), place)
            print(f"warning: {checkpoints / str(step)} is damaged ({reason}) and was moved to {place}: "
                  f"going on from step {good}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Waits for pending saves; if that fails, prints a warning."""
        self._attempt(self._manager.wait_until_finished)
        self._manager.close()


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError, in every process, if `size` bytes of arrays will not fit.

    A failure in the middle of writing would cost more.
    """
    free = shutil.disk_usage(folder).free
    if not everywhere(free >= size):
        raise OSError(f"No space left on device: {free / 1e6:,.1f} MB free, {size / 1e6:,.1f} MB to write")


def save_params(workdir: Path, params: Params) -> None:
    """Writes `params` (JAX arrays) as step 0 of a workdir that holds a model and no training.

    This needs little more extra memory than the largest array. Raises UserError if they cannot be read again.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Typed as a whole number of gigabytes, but any number is accepted. An array above the limit is refused.
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1.1 * largest / 1e9 + 0.05)  # pyright: ignore[reportArgumentType]
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    facts = seal({"step": 0, "position": 0, "arrays": summed({"params": params})})
    with _open_manager(workdir, options, handler) as manager:
        manager.save(0, args=ocp.args.Composite(
            params=ocp.args.StandardSave(params), data=ocp.args.JsonSave(facts)))
        _prove(manager, 0, {"params": params})


@contextlib.contextmanager
def open_checkpoints(workdir: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of `workdir`; pending saves are finished when the block ends."""
    checkpoints = Checkpoints(workdir, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def load_params(workdir: Path, shapes: Params) -> tuple[Params, int]:
    """Parameters of the newest checkpoint of `workdir` and its step.

    Raises UserError if there is none, if it is damaged, or if it does not fit `shapes`.
    """
    missing = UserError(f"{workdir} has no checkpoint yet: train it with train.py --workdir {workdir}")
    if not (workdir / CHECKPOINTS).is_dir():
        raise missing
    # Orbax warns that a read-only manager creates and saves nothing, which is what we want.
    with _without_warnings():
        opened = _open_manager(workdir, ocp.CheckpointManagerOptions(read_only=True))
    with opened as manager:
        while True:
            step = manager.latest_step()
            if step is None:
                raise missing
            try:
                found, _ = _read(manager, step, {"params": shapes})
                return found["params"], step
            except _DamageError as error:
                damage = error
            # If the run is training meanwhile, it removes its old checkpoints.
            if _place(manager, step).exists():
                break
            manager.reload()
        others = [other for other in manager.all_steps() if other != step]
        rest = f"delete it to continue from step {max(others)}" if others else "there is no other one"
        raise UserError(f"{workdir / CHECKPOINTS / str(step)} is damaged ({damage}): {rest}")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences what the checkpoint library logs below the level of an error."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(manager: ocp.CheckpointManager, step: int, shapes: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The items of `shapes` as arrays, verified to be what was saved, and the position in the data.

    Raises _DamageError in every process if one of them finds damage, and UserError if what was saved does not fit.
    """
    where = _place(manager, step)
    facts, said = _tried(where, lambda: _facts(manager, step))
    _raise_everywhere(said)
    checked = {name: shapes[name] for name in shapes if name in facts["items"]}
    _check_fits(str(where.resolve()), facts["arrays"], checked)
    arrays, said = _tried(where, lambda: manager.restore(step, args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(item) for name, item in shapes.items()})))
    _raise_everywhere(said)
    found = {name: arrays[name] for name in shapes}
    known = {name: one["sum"] for name, one in facts["arrays"].items() if "sum" in one}
    changed = [name for name, one in summed(found).items() if one["sum"] != known.get(name, one["sum"])]
    if changed:
        raise _DamageError(f"the bits of {changed[0]} are not those that were written")
    return found, facts["position"]


def _prove(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> None:
    """Raises UserError unless the seal of a checkpoint just written and the smallest array of each item can be read.

    Reading everything would take as much memory again as the `items` (arrays).
    """
    place = _place(manager, step)

    def read() -> list[str]:
        known = _facts(manager, step)["arrays"]
        found = {name: _smallest(place / name, item) for name, item in items.items()}
        return [name for name, one in summed(found).items() if one["sum"] != known[name]["sum"]]

    changed, said = _tried(place, read)
    if not everywhere(said is None and not changed):
        raise UserError(f"{place.resolve()} was written but cannot be read again "
                        f"({said or ', '.join(changed or ()) or 'found by another process'}): choose another folder")


def _smallest(folder: Path, item: Any) -> Any:
    """The smallest array of `item`, read from `folder`, in the tree of `item` with None for all others."""
    path, leaf = min(jax.tree_util.tree_leaves_with_path(item), key=lambda pair: pair[1].nbytes)
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    one = jax.tree_util.tree_map_with_path(lambda where, _: shape if where == path else None, item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, ocp.args.PyTreeRestore(
            one, restore_args=ocp.checkpoint_utils.construct_restore_args(one), partial_restore=True))


def _place(manager: ocp.CheckpointManager, step: int) -> Path:
    """The folder of a checkpoint as the library knows it; messages show its resolved path."""
    return Path(manager.directory) / str(step)


def _facts(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """`position`, `arrays` by name, and the `items` whose arrays these are.

    Raises _DamageError if the seal is broken. If a checkpoint is older than seals, Orbax's metadata is trusted.
    """
    imported = step == 0 and not (_place(manager, step) / "data").exists()
    found = {"position": 0} if imported else manager.restore(
        step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
    if isinstance(found, dict) and set(found) == {"position"}:
        stored = manager.item_metadata(step)["params"].tree
        return found | {"items": ("params",), "arrays": describe({"params": stored})}
    if not (is_sealed(found) and found["step"] == step):
        raise _DamageError("data/metadata is not what was written")
    return found | {"items": ("params", "optimizer")}


def _tried(where: Path, read: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of `read` and None; or None and a text that says what is wrong with the files in `where`.

    Raises UserError if the machine is at fault and not the files: another attempt may then succeed.
    """
    with _without_tracebacks():
        try:
            return read(), None
        except Exception as error:
            said = _innermost(error).replace(str(where), str(where.resolve()))
            if isinstance(error, MemoryError) or any(word in said for word in _MACHINE):
                raise UserError(f"{where.resolve()} cannot be read now: {said}") from None
        # Parallel reads fail too, some a little later. Their futures are collected here, without tracebacks.
        time.sleep(0.3)
        gc.collect()
        return None, said


def _innermost(error: Exception) -> str:
    """The message of the first error in the chain, which names the file."""
    while isinstance(cause := error.__cause__ or error.__context__, Exception):
        error = cause
    return one_line(error)[:200]


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Silences tracebacks of threads and futures, which Python would print for each array that cannot be read."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _raise_everywhere(said: str | None) -> None:
    if not everywhere(said is None):
        raise _DamageError(said or "found by another process")


def _check_fits(where: str, stored: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Raises UserError unless the stored names, shapes and types are those expected: Orbax would cast silently."""
    wanted = describe(shapes)
    for name in [*wanted, *stored]:
        if name.split("/")[0] not in shapes:
            continue
        if name not in wanted:
            raise UserError(f"{where}: {name} has no place in the config's model")
        found = {key: value for key, value in stored.get(name, {}).items() if key != "sum"}
        if found != wanted[name]:
            raise UserError(f"{where}: {name} is {_words(found)}, the config wants {_words(wanted[name])}")


def _words(facts: dict[str, Any]) -> str:
    return f"{facts['dtype']} {tuple(facts['shape'])}" if facts else "missing"
