"""Noise of the tail during generation: embryos, and fresh noise at every step (METHOD §4).

Every draw is a function of the row's key and of indices, so it depends on neither the batch nor the order.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.maturation import noise_vector

_FRESH = 2**32 - 2
"""Index from which the key of the fresh noise is derived; embryos never reach it."""


@struct.dataclass
class FreshNoise:
    """Noise that is added to the slots at every step; a pytree of numbers."""

    norm: jax.Array
    """σ_f [], norm in units of R of the noise for a slot of maturity 0; a slot of maturity α gets 1 − α of it."""


def make_fresh_noise(settings: GenerationConfig) -> FreshNoise | None:
    """None at σ_f = 0."""
    return None if settings.fresh_noise == 0.0 else FreshNoise(jnp.float32(settings.fresh_noise))


def embryos(key: jax.Array, first: jax.Array, count: int, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """Embryos [B, count, d] of each row, from index `first` on; embryo i depends only on the row's key and i."""

    def row(key, first):
        numbers = first + jnp.arange(count)
        return jax.vmap(
            lambda number: noise_vector(jax.random.fold_in(key, number), (embed_dim,), noise, radius)
        )(numbers)

    return jax.vmap(row)(key, first)


def fresh(
    key: jax.Array, num_committed: jax.Array, slot: jax.Array, maturity: jax.Array, noise: FreshNoise, embed_dim: int,
    radius: float,
) -> jax.Array:
    """(1 − α) σ_f R ε/√d [B, N, d] for slots with index `slot` [N] and `maturity` [N] when `num_committed` [B, N]
    positions are committed, in rows with `key` [B]. ε depends on slot, count and key, so it changes with every
    commit."""

    def one(key, num_committed, slot):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _FRESH), num_committed), slot)
        return noise_vector(key, (embed_dim,), noise.norm, radius)

    drawn = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, 0, None))(key, num_committed, slot)
    return (1.0 - maturity)[None, :, None] * drawn
