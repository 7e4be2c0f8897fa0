"""Repulsion: a prediction is pushed away from the tokens committed after similar predictions (ours).

A text that loops returns to the same predictions. Every committed position m is remembered as a pair: the prediction
ẑ_m for that position, and the vector z_m that was committed there. With unit vectors u(·), strength ρ and
sharpness b,

    a_m = exp(b (cos(ẑ, ẑ_m) − 1))        p = Σ a_m u(z_m) / max(1, Σ a_m)        ẑ ← ẑ − ρ ‖ẑ‖ p

for each slot's ẑ, with sums over the committed positions. Nothing is pushed if ρ = 0, or if no earlier prediction was
similar to this one. The pairs depend only on the committed text, prompt included, so caching stays exact, and a step
needs no further pass of the model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.table import unit


@struct.dataclass
class Repulsion:
    """Strength and sharpness of the push; a pytree of numbers."""

    strength: jax.Array
    """ρ [] ≥ 0, length of the push as a share of ‖ẑ‖."""
    sharpness: jax.Array
    """b [] > 0; the larger it is, the more similar two predictions must be for a push."""


def make_repulsion(settings: GenerationConfig) -> Repulsion | None:
    """None at ρ = 0."""
    if settings.repulsion == 0.0:
        return None
    return Repulsion(jnp.float32(settings.repulsion), jnp.float32(settings.repulsion_sharpness))


@struct.dataclass
class Trace:
    """Prediction and committed vector of every committed position. Index s of the capacity S holds position s. Entries
    from a row's n on are not valid yet, and position 0 has no prediction: readers must mask both."""

    predicted: jax.Array
    """u(ẑ_s) [B, S, d], before it was pushed."""
    committed: jax.Array
    """u(z_s) [B, S, d], as it entered the history."""


@struct.dataclass
class Remembering:
    """A decoder's memory: the model's own, and a trace."""

    memory: Any
    """The model's own memory, any pytree."""
    trace: Trace


def begin_trace(prediction: jax.Array, vectors: jax.Array, capacity: int) -> Trace:
    """The trace of prompts: their `vectors` [B, P, d], and the `prediction` [B, P, d] after each of them.

    It has room for `capacity` positions, but always for at least one after the prompts.
    """
    rest = max(capacity - vectors.shape[1], 1)
    return Trace(jnp.pad(unit(prediction), ((0, 0), (1, rest - 1), (0, 0))),
                 jnp.pad(unit(vectors), ((0, 0), (0, rest), (0, 0))))


def push(prediction: jax.Array, trace: Trace, num_committed: jax.Array, repulsion: Repulsion) -> jax.Array:
    """`prediction` [B, K, d] pushed away from committed vectors; each slot counts the first `num_committed` [B, K] of
    them."""
    # Rounding can raise the cosine of equal vectors above 1, which a large b would amplify.
    cosine = jnp.minimum(jnp.einsum("bkd,bsd->bks", unit(prediction), trace.predicted), 1.0)
    position = jnp.arange(trace.predicted.shape[1])[None, :]
    valid = (position >= 1)[:, None] & (position[:, None] < num_committed[..., None])
    weight = jnp.where(valid, jnp.exp(repulsion.sharpness * (cosine - 1.0)), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    away = jnp.einsum("bks,bsd->bkd", weight, trace.committed) / jnp.maximum(total, 1.0)
    return prediction - repulsion.strength * jnp.linalg.norm(prediction, axis=-1, keepdims=True) * away


def repel(predict, repulsion: Repulsion):
    """Wraps a decoder's `predict` so that its predictions are pushed; its memory becomes a `Remembering`.

    This writes to the trace the newest committed vectors, as many as a step may commit, and the drafts after them. It
    also writes the predictions ẑ for these and for the front, made from committed positions. A checked position counts
    the drafts before it. Entries that are not committed are overwritten before they count.
    """

    def repelled(state):
        old: Remembering = state.memory
        prediction, memory = predict(state.replace(memory=old.memory))
        n, newest = state.num_committed, state.recent.shape[1]
        drafts = 0 if state.drafts is None else state.drafts.vectors.shape[1]
        read = state.recent if state.drafts is None else jnp.concatenate([state.recent, state.drafts.vectors], axis=1)
        place = n[:, None] - newest + jnp.arange(newest + drafts)[None, :]
        trace = Trace(_write(old.trace.predicted, place + 1, unit(prediction[:, : newest + drafts])),
                      _write(old.trace.committed, place, unit(read)))
        prediction = prediction[:, newest - 1 :]
        index = jnp.arange(prediction.shape[1])[None, :]
        counted = n[:, None] + jnp.where(index <= drafts, index, 0) if drafts else jnp.broadcast_to(
            n[:, None], prediction.shape[:2])
        return push(prediction, trace, counted, repulsion), Remembering(memory, trace)

    return repelled


def _write(whole: jax.Array, positions: jax.Array, vectors: jax.Array) -> jax.Array:
    """`whole` [B, S, d] with `vectors` [B, M, d] at `positions` [B, M]; negative positions are ignored."""
    place = jnp.where(positions < 0, whole.shape[1], positions)
    return whole.at[jnp.arange(len(whole))[:, None], place].set(vectors, mode="drop")
