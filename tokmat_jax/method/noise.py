"""What chance gives to the tail while text is written: embryos, and fresh noise at every step (METHOD §4).

Every draw is a function of the row's key and a number, so that it depends on neither batch nor order.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.maturation import noise_vector

_FRESH = 2**32 - 2
"""Numbers the key of the fresh noise; embryos never get that far."""


@struct.dataclass
class FreshNoise:
    """Noise that slots get at every step; a pytree of numbers."""

    norm: jax.Array
    """σ_f [], in units of R, of what is added to a slot of maturity 0; 1 − α of it to others."""


def make_fresh_noise(settings: GenerationConfig) -> FreshNoise | None:
    """None at σ_f = 0."""
    return None if settings.fresh_noise == 0.0 else FreshNoise(jnp.float32(settings.fresh_noise))


def embryos(key: jax.Array, first: jax.Array, count: int, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """The embryos number `first`.. of each row [B, count, d]: number i of a row depends on its key and i alone."""

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
    """(1 − α) σ_f R ε/√d [B, N, d] for slots number `slot` [N] of `maturity` [N] when `num_committed` [B, N] positions
    are committed, in rows with `key` [B]. These three decide it, so that it is another one at every commit."""

    def one(key, num_committed, slot):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _FRESH), num_committed), slot)
        return noise_vector(key, (embed_dim,), noise.norm, radius)

    drawn = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, 0, None))(key, num_committed, slot)
    return (1.0 - maturity)[None, :, None] * drawn
