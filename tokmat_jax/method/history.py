"""What a committed token is in the history: its vector, smoothed and disturbed once, when it enters (METHOD §4).

    z_n = (1 − h) e_x + h z_{n−1} + σ_h R ε/√d

Nothing is drawn or mixed again later, so that keys and values computed from the vector stay exact.
"""

import jax
import jax.numpy as jnp

from tokmat_jax.method.maturation import noise_vector

_HISTORY = 2**32 - 1
"""Numbers the key of the history's noise; embryos never get that far."""


def enter(
    clean: jax.Array, last: jax.Array, key: jax.Array, first: jax.Array, noise: jax.Array | None,
    smoothing: jax.Array | None, radius: float,
) -> jax.Array:
    """Vectors [B, M, d] of M tokens that enter one behind the other at positions `first` [B] and on.

    `clean` [B, M, d] are their rows of the table, `last` [B, d] is the vector before them, `key` [B] the rows' keys,
    `noise` σ_h [] ≥ 0 and `smoothing` h [] in [0, 1); None is off.
    """
    entered, before = [], last
    for index in range(clean.shape[1]):
        vector = clean[:, index]
        if smoothing is not None:
            vector = (1.0 - smoothing) * vector + smoothing * before
        if noise is not None:
            vector = vector + history_noise(key, first + index, vector.shape[-1], noise, radius)
        entered.append(vector)
        before = vector
    return jnp.stack(entered, axis=1)


def history_noise(key: jax.Array, position: jax.Array, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """σ_h R ε/√d [B, d] for vectors that enter the history at `position` [B] of rows with `key` [B].

    Drawn once per position: nothing but the row's key and the position decides it.
    """

    def row(key, position):
        key = jax.random.fold_in(jax.random.fold_in(key, _HISTORY), position)
        return noise_vector(key, (embed_dim,), noise, radius)

    return jax.vmap(row)(key, position)
