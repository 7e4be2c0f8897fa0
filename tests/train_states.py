"""Small states of training in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.model.params import TrainState
from tokmat_jax.storage.checkpoint import Checkpoints

SIZE = 4096


def state(step):
    """A state that differs from that of any other step."""
    rng = np.random.default_rng(step)
    params = {"backbone": {"kernel": jnp.asarray(rng.normal(size=(8, SIZE // 8)), jnp.float32)},
              "table": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
    return TrainState(jnp.int32(step), params, {"mu": jax.tree.map(lambda x: x + 1, params), "count": jnp.int32(step)})


SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))


def write(workdir, *steps):
    """Checkpoints of these steps; returns the workdir."""
    checkpoints = Checkpoints(workdir, keep=9)
    for step in steps:
        checkpoints.save(state(step), position=10 * step)
    checkpoints.close()
    return workdir


def restore(workdir):
    """(state, position, steps that are listed afterwards)"""
    checkpoints = Checkpoints(workdir, keep=9)
    try:
        return *checkpoints.restore(SHAPES), sorted(checkpoints._manager.all_steps())
    finally:
        checkpoints.close()
