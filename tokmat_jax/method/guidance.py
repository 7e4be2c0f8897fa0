"""Classifier-free guidance: combining two predictions, and what the unconditional one may see (METHOD §4).

Guidance is off at s = 1. The unconditional pass sees the last committed token and the tail before the query, and
nothing earlier; in training, history dropout hides the same positions.
"""

import jax
import jax.numpy as jnp

from tokmat_jax.model.attention import causal_mask


def combine(conditional: jax.Array, unconditional: jax.Array, guidance_scale: jax.Array | float) -> jax.Array:
    """ẑ = ẑ_u + s (ẑ_c − ẑ_u); all predictions [..., d]."""
    return unconditional + guidance_scale * (conditional - unconditional)


def guide(conditional, unconditional, guidance_scale: jax.Array | float):
    """One `predict` from two: the decoder cannot tell that guidance exists.

    Each takes a decoder state and returns (prediction, memory); the unconditional one predicts the tail alone
    [B, K, d], and the memory is the conditional one's.
    """

    def predict(state):
        prediction, memory = conditional(state)
        free, _ = unconditional(state)
        return combine(prediction[:, -free.shape[1]:], free, guidance_scale), memory

    return predict


def history_mask(
    seq_len: int, num_committed: jax.Array, dropped: jax.Array, num_queries: int | None = None
) -> jax.Array:
    """[B, Q, T] bool, what the last `num_queries` Q (None: all) of T positions see: causal, and where `dropped` [B]
    nothing before the last committed position is seen from it on.

    `num_committed` [B] counts the committed positions, so the last one is num_committed − 1.
    """
    last = num_committed[:, None, None] - 1
    position = jnp.arange(seq_len)
    first = 0 if num_queries is None else seq_len - num_queries
    query, key = position[None, first:, None], position[None, None, :]
    hidden = dropped[:, None, None] & (query >= last) & (key < last)
    return causal_mask(seq_len)[:, first:] & ~hidden
