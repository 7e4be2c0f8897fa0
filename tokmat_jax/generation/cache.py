"""The Transformer as a `predict` for the decoder, with exact caching (METHOD §4).

Committed positions have maturity 1 and K is constant, and attention is causal: their keys and values never change. A
step asks about positions n .. n+K−1, so it needs the outputs at n−1 .. n+K−2: the token committed last and all slots
but the hindmost. Only the first of these K queries is new to the history and stays.

Where a step may commit up to M tokens, the M newest committed positions are queries, so that shapes stay fixed: those
of them that were in the history already are written again with what they had.
"""

import jax
import jax.numpy as jnp

from tokmat_jax.method.algorithm import DecodeState, Predict
from tokmat_jax.method.guidance import guide
from tokmat_jax.method.repulsion import Remembering, begin_trace, repel
from tokmat_jax.method.tail import Tail
from tokmat_jax.model.attention import causal_mask
from tokmat_jax.model.backbone import KVCache, Model


def prefill(
    model: Model, vectors: jax.Array, tail_length: jax.Array, capacity: int, repelled: bool = False
) -> KVCache | Remembering:
    """Keys and values of prompts [B, P, d] of any lengths up to P, in a history of `capacity` ≥ P positions, with the
    trace of repulsion where the decoder is `repelled`.

    Rows may be filled up with anything behind their end: what stands there is never read before it is rewritten.
    """
    prediction, history = read_prompts(model, vectors, tail_length, capacity)
    return Remembering(history, begin_trace(prediction, vectors, capacity)) if repelled else history


def read_prompts(model: Model, vectors: jax.Array, tail_length: jax.Array, capacity: int) -> tuple[jax.Array, KVCache]:
    """As `prefill`, with the predictions [B, P, d] before it."""
    batch, length, _ = vectors.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    prediction, live = model(vectors, jnp.ones((batch, length)), tail_length, positions)
    room = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
    return prediction, jax.tree.map(lambda x: jnp.pad(x, room), live)


def _queries(state: DecodeState, tail: Tail, max_commit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors, maturity and positions [B, M + K − 1, …] of the queries of a step: the `max_commit` M newest committed
    positions, and all slots but the hindmost. Positions of a row with n < M begin below 0."""
    length = state.tail.shape[1]
    vectors = jnp.concatenate([state.recent[:, -max_commit:], state.tail[:, :-1]], axis=1)
    maturity = jnp.concatenate([jnp.ones((max_commit,)), tail.maturity[:-1]])
    positions = state.num_committed[:, None] - max_commit + jnp.arange(max_commit + length - 1)[None, :]
    return vectors, jnp.broadcast_to(maturity[None, :], positions.shape), positions


def append(history: KVCache, live: KVCache, positions: jax.Array) -> KVCache:
    """The history with the keys and values of the first M `live` queries written at `positions` [B, M] of each row;
    what lies below 0 is left out."""
    rows, count = jnp.arange(positions.shape[0])[:, None], positions.shape[1]

    def write(whole, new):
        place = jnp.where(positions < 0, whole.shape[2], positions)
        return whole.at[rows, :, place].set(new[:, :, :count].swapaxes(1, 2).astype(whole.dtype), mode="drop")

    return jax.tree.map(write, history, live)


def cached_predict(model: Model, tail: Tail, model_tail_length: int) -> Predict:
    """`predict` of the decoder over a KV cache: M + K − 1 query positions a step, and K more with guidance.

    `model_tail_length` is the K that the model is told by FiLM (0 for an autoregressive backbone). The
    unconditional pass has the last committed position and the same slots, and no history. Repulsion pushes the
    conditional prediction; its memory is that of `prefill` with `repelled`.
    """

    def tail_length(state):
        return jnp.full(state.num_committed.shape, model_tail_length, jnp.int32)

    def conditional(state):
        max_commit = state.recent.shape[1]
        vectors, maturity, positions = _queries(state, tail, max_commit)
        history: KVCache = state.memory
        visible = jnp.arange(history[0].capacity)[None, :] < state.num_committed[:, None] - max_commit
        prediction, live = model(
            vectors, maturity, tail_length(state), jnp.maximum(positions, 0),
            causal_mask(positions.shape[1]) & (positions >= 0)[:, None, :] if max_commit > 1 else None,
            history=history, visible=visible)
        return prediction, append(history, live, positions[:, :max_commit])

    def unconditional(state):
        vectors, maturity, positions = _queries(state, tail, 1)
        return model(vectors, maturity, tail_length(state), positions)[0], state.memory

    seeing = conditional
    if tail.repulsion is not None:
        seeing = repel(conditional, tail.maturity.shape[0], tail.repulsion)
    return seeing if tail.guidance is None else guide(seeing, unconditional, tail.guidance)
