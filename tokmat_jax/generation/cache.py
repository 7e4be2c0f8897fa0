"""The Transformer as a `predict` for the decoder, with exact caching (METHOD §4).

Committed positions have maturity 1 and K is constant, and attention is causal: their keys and values never change. A
step asks about positions n .. n+K−1, so it needs the outputs at n−1 .. n+K−2: the token committed last and all slots
but the hindmost. Only the first of these K queries is new to the history and stays.

If a step may commit up to C tokens that have settled, the C newest committed positions are queries, so that shapes stay
fixed: those of them that were in the history already are written again with what they had. M drafts that are checked
are queries too, and are written as if they were committed: what is accepted stays, and what is rejected is overwritten
before it is seen.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Queries:
    """What a step asks the model about: the C newest committed positions, M drafts, all slots but the hindmost."""

    vectors: jax.Array
    """[B, C + M + K − 1, d]."""
    maturity: jax.Array
    """α [B, C + M + K − 1]; 1 for what is committed and for drafts."""
    tail_length: jax.Array
    """K that the model is told at each, [B, C + M + K − 1]."""
    positions: jax.Array
    """[B, C + M + K − 1]; below 0 in a row with n < C. Drafts and slots share theirs."""


def _queries(state: DecodeState, tail: Tail, newest: int) -> _Queries:
    length, drafts = state.tail.shape[1], 0 if state.drafts is None else state.drafts.vectors.shape[1]
    parts = [state.recent[:, -newest:], *([state.drafts.vectors] if state.drafts is not None else []),
             state.tail[:, :-1]]
    committed = jnp.arange(newest + drafts) - newest
    offset = jnp.concatenate([committed, jnp.arange(length - 1)])
    positions = state.num_committed[:, None] + offset[None, :]
    maturity = jnp.concatenate([jnp.ones((newest + drafts,)), tail.maturity[:-1]])
    told = jnp.concatenate([jnp.full((newest + drafts,), tail.model_tail_length), jnp.full((length - 1,), length)])
    return _Queries(jnp.concatenate(parts, axis=1), jnp.broadcast_to(maturity[None, :], positions.shape),
                    jnp.broadcast_to(told[None, :], positions.shape), positions)


def _mask(newest: int, drafts: int, slots: int, unconditional: bool = False) -> jax.Array:
    """[1, Q, Q] bool: which queries of a step see which. Drafts see what is newest and earlier drafts; slots see what
    is newest and earlier slots, never a draft. In the unconditional pass a draft sees itself alone."""
    committed = newest + drafts
    mask = causal_mask(committed + slots)
    mask = mask.at[:, committed:, newest:committed].set(False)
    if unconditional:
        mask = mask.at[:, newest:committed, :committed].set(jnp.eye(committed, dtype=bool)[None, newest:])
    return mask


def append(history: KVCache, live: KVCache, positions: jax.Array) -> KVCache:
    """The history with the keys and values of the first M `live` queries written at `positions` [B, M] of each row;
    what lies below 0 is left out."""
    rows, count = jnp.arange(positions.shape[0])[:, None], positions.shape[1]

    def write(whole, new):
        place = jnp.where(positions < 0, whole.shape[2], positions)
        return whole.at[rows, :, place].set(new[:, :, :count].swapaxes(1, 2).astype(whole.dtype), mode="drop")

    return jax.tree.map(write, history, live)


def cached_predict(model: Model, tail: Tail) -> Predict:
    """`predict` of the decoder over a KV cache: C + M + K − 1 query positions a step for the C positions that a step
    may commit and M drafts (C = 1 if there are any), and M + K more with guidance.

    The unconditional pass has the last committed position, the same drafts and the same slots, and no history.
    Repulsion pushes the conditional prediction; its memory is that of `prefill` with `repelled`.
    """

    def conditional(state):
        newest, drafts = state.recent.shape[1], 0 if state.drafts is None else state.drafts.vectors.shape[1]
        asked = _queries(state, tail, newest)
        history: KVCache = state.memory
        visible = jnp.arange(history[0].capacity)[None, :] < state.num_committed[:, None] - newest
        mask = None
        if newest > 1 or drafts:
            mask = _mask(newest, drafts, state.tail.shape[1] - 1) & (asked.positions >= 0)[:, None, :]
        prediction, live = model(asked.vectors, asked.maturity, asked.tail_length, jnp.maximum(asked.positions, 0),
                                 mask, history=history, visible=visible)
        return prediction, append(history, live, asked.positions[:, : newest + drafts])

    def unconditional(state):
        asked, drafts = _queries(state, tail, 1), 0 if state.drafts is None else state.drafts.vectors.shape[1]
        mask = _mask(1, drafts, state.tail.shape[1] - 1, unconditional=True) if drafts else None
        return model(asked.vectors, asked.maturity, asked.tail_length, asked.positions, mask)[0], state.memory

    seeing = conditional if tail.repulsion is None else repel(conditional, tail.repulsion)
    return seeing if tail.guidance is None else guide(seeing, unconditional, tail.guidance)
