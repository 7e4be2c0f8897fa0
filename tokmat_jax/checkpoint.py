"""Checkpoints through Orbax: parameters, optimiser and data position as separate items of one step.

Generation reads the parameters alone. Saving is asynchronous; a step is listed only when all its items are complete.
Nothing in a checkpoint depends on the mesh or on the number of processes that wrote it.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from tokmat_jax.errors import UserError
from tokmat_jax.model import Params
from tokmat_jax.sharding import path_name
from tokmat_jax.train_step import TrainState
from tokmat_jax.workdir import CHECKPOINTS


def _open_manager(
    workdir: Path, options: ocp.CheckpointManagerOptions, params: ocp.StandardCheckpointHandler | None = None
) -> ocp.CheckpointManager:
    handlers = {
        "params": params or ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(workdir.resolve() / CHECKPOINTS, options=options, item_handlers=handlers)


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, keep: int):
        self._manager = _open_manager(
            workdir, ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        )

    def latest_step(self) -> int | None:
        """The newest complete step, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: int) -> None:
        """Starts saving `state` and the `position` in the data; returns before it is on disk."""
        step = int(state.step)
        if step == self.latest_step():
            return
        self._manager.save(step, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            data=ocp.args.JsonSave({"position": position}),
        ))

    def restore(self, shapes: TrainState) -> tuple[TrainState, int]:
        """The newest state, placed as `shapes` says, and its position in the data."""
        step = self.latest_step()
        assert step is not None
        _check(self._manager, step, shapes.params)
        optimizer = {"step": shapes.step, "opt_state": shapes.opt_state}
        with _named(self._manager, step):
            found = self._manager.restore(step, args=ocp.args.Composite(
                params=ocp.args.StandardRestore(shapes.params),
                optimizer=ocp.args.StandardRestore(optimizer),
                data=ocp.args.JsonRestore(),
            ))
            position = int(found["data"]["position"])
        return TrainState(found["optimizer"]["step"], found["params"], found["optimizer"]["opt_state"]), position

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def save_params(workdir: Path, params: Params) -> None:
    """Writes `params` (JAX arrays) as step 0 of a workdir that holds a model and no training.

    Beside them, little more than the largest one takes memory.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Typed as a whole number of gigabytes; any number is taken, and an array above the limit is refused.
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1.1 * largest / 1e9 + 0.05)  # pyright: ignore[reportArgumentType]
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    with _open_manager(workdir, options, handler) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))


@contextlib.contextmanager
def open_checkpoints(workdir: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of `workdir`; what is being saved is finished on the way out."""
    checkpoints = Checkpoints(workdir, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def load_params(workdir: Path, shapes: Params) -> tuple[Params, int]:
    """Parameters of the newest checkpoint of `workdir` and its step; raises UserError where there is none."""
    missing = UserError(f"{workdir} has no checkpoint yet: train it with train.py --workdir {workdir}")
    if not (workdir / CHECKPOINTS).is_dir():
        raise missing
    # Orbax warns that a manager which only reads creates and saves nothing; that is what it is for.
    with _without_warnings():
        opened = _open_manager(workdir, ocp.CheckpointManagerOptions(read_only=True))
    with opened as manager:
        step = manager.latest_step()
        if step is None:
            raise missing
        _check(manager, step, shapes)
        with _named(manager, step):
            found = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes)))
        return found["params"], step


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what the checkpoint library logs below the level of an error."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _named(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Whatever goes wrong while reading a checkpoint is a complaint about that checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        others = [other for other in manager.all_steps() if other != step]
        rest = f"delete it to go on from step {max(others)}" if others else "there is no other one"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{manager.directory / str(step)} is damaged ({reason}): {rest}") from None


def _check(manager: ocp.CheckpointManager, step: int, shapes: Params) -> None:
    """Raises UserError unless the stored names, shapes and types are those expected: Orbax would cast silently."""
    where = manager.directory / str(step)
    with _named(manager, step):
        stored = manager.item_metadata(step)["params"].tree
    described = {
        path_name(path): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(stored)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name, expected = path_name(path), (tuple(leaf.shape), str(leaf.dtype))
        found = described.pop(name, None)
        if found != expected:
            raise UserError(f"{where}: {name} is {found or 'missing'}, the config wants {expected}")
    if described:
        raise UserError(f"{where}: {next(iter(described))} has no place in the config's model")
