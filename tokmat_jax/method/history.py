"""Vectors of the history: a committed token's vector is smoothed and gets noise once, when it enters (METHOD §4).

    z_n = (1 − h) e_x + h z_{n−1} + σ_h R ε/√d

Nothing is drawn or mixed again later, so keys and values computed from the vector stay exact.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.maturation import noise_vector

_HISTORY = 2**32 - 1
"""Index from which the key of the history's noise is derived; embryos never reach it."""


@struct.dataclass
class Entry:
    """How a vector changes when it enters the history; a pytree of numbers. A field is None if its control is off."""

    noise: jax.Array | None = None
    """σ_h [] ≥ 0, norm of the added noise in units of R."""
    smoothing: jax.Array | None = None
    """h [] in [0, 1), share of the previous vector."""


def make_entry(settings: GenerationConfig) -> Entry:
    """The Entry of `settings`; a field is None if its control is off."""
    noise, smoothing = settings.history_noise, settings.history_smoothing
    return Entry(jnp.float32(noise) if noise else None, jnp.float32(smoothing) if smoothing else None)


def committed_vectors(
    clean: jax.Array, last: jax.Array, key: jax.Array, first: jax.Array, entry: Entry, radius: float
) -> jax.Array:
    """Vectors [B, M, d] of M tokens that enter one after the other, from position `first` [B] on.

    `clean` [B, M, d] are their rows of the table, `last` [B, d] is the vector before them, `key` [B] the rows' keys.
    """
    entered, before = [], last
    for index in range(clean.shape[1]):
        vector = clean[:, index]
        if entry.smoothing is not None:
            vector = (1.0 - entry.smoothing) * vector + entry.smoothing * before
        if entry.noise is not None:
            vector = vector + history_noise(key, first + index, vector.shape[-1], entry.noise, radius)
        entered.append(vector)
        before = vector
    return jnp.stack(entered, axis=1) if entered else clean


def history_noise(key: jax.Array, position: jax.Array, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """σ_h R ε/√d [B, d] for vectors that enter the history at `position` [B] of rows with `key` [B].

    Drawn once per position: it depends only on the row's key and the position.
    """

    def row(key, position):
        key = jax.random.fold_in(jax.random.fold_in(key, _HISTORY), position)
        return noise_vector(key, (embed_dim,), noise, radius)

    return jax.vmap(row)(key, position)
