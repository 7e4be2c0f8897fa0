"""Commit when stable: how many slots from the front on have settled (METHOD §4).

A slot has settled if its nearest token has not changed for `patience` updates and its last movement ‖Δz̃‖/R is below
`tolerance`. The longest settled run from the front on is committed, at least one token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig


@struct.dataclass
class Stability:
    """When a slot counts as settled; a pytree of numbers."""

    patience: jax.Array
    """Updates [] in a row that must not change the nearest token."""
    tolerance: jax.Array
    """Upper bound [] on the last movement, in units of R."""


def make_stability(settings: GenerationConfig) -> Stability | None:
    """None unless slots are committed when stable."""
    if settings.commit != "stable":
        return None
    return Stability(jnp.int32(settings.patience), jnp.float32(settings.tolerance))


@struct.dataclass
class Settling:
    """Each slot's nearest token, and for how many updates it has not changed."""

    nearest: jax.Array
    """Nearest tokens [B, K] after the last update; −1 for an embryo."""
    unchanged: jax.Array
    """Updates [B, K] in a row that did not change it."""


def unborn(batch: int, tail_length: int) -> Settling:
    """Initial state: no slot has a nearest token yet."""
    return Settling(jnp.full((batch, tail_length), -1, jnp.int32), jnp.zeros((batch, tail_length), jnp.int32))


def settle(settling: Settling, nearest: jax.Array, done: jax.Array) -> Settling:
    """`settling` after an update whose nearest tokens are `nearest` [B, K]; rows that are `done` [B] do not change."""
    unchanged = jnp.where(nearest == settling.nearest, settling.unchanged + 1, 0)
    return Settling(jnp.where(done[:, None], settling.nearest, nearest),
                    jnp.where(done[:, None], settling.unchanged, unchanged))


def settled_run(settling: Settling, movement: jax.Array, stability: Stability) -> jax.Array:
    """Number [B] of settled slots from the front on, 0..K; `movement` ‖Δz̃‖/R [B, K] is that of the last update."""
    settled = (settling.unchanged >= stability.patience) & (movement < stability.tolerance)
    return jnp.sum(jnp.cumprod(settled.astype(jnp.int32), axis=1), axis=1)
