"""The Transformer as a `predict` for the decoder, with exact caching (METHOD §4).

Committed positions have maturity 1 and K is constant, and attention is causal: their keys and values never change. A
step asks about positions n .. n+K−1, so it needs the outputs at n−1 .. n+K−2: the token committed last and all slots
but the hindmost. Only the first of these K queries is new to the history and stays.
"""

import jax
import jax.numpy as jnp

from tokmat_jax.attention import History
from tokmat_jax.decode import Predict, State, Tail
from tokmat_jax.guidance import guide
from tokmat_jax.model import Forward, Params
from tokmat_jax.repulsion import Remembering, begin_trace, repel


def prefill(
    params: Params, forward: Forward, vectors: jax.Array, tail_length: jax.Array, capacity: int, repelled: bool = False
) -> History | Remembering:
    """Keys and values of prompts [B, P, d] of any lengths up to P, in a history of `capacity` ≥ P positions, with the
    trace of repulsion where the decoder is `repelled`.

    Rows may be filled up with anything behind their end: what stands there is never read before it is rewritten.
    """
    prediction, history = read_prompts(params, forward, vectors, tail_length, capacity)
    return Remembering(history, begin_trace(prediction, vectors, capacity)) if repelled else history


def read_prompts(
    params: Params, forward: Forward, vectors: jax.Array, tail_length: jax.Array, capacity: int
) -> tuple[jax.Array, History]:
    """As `prefill`, with the predictions [B, P, d] before it."""
    batch, length, _ = vectors.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    prediction, live = forward(params, vectors, jnp.ones((batch, length)), tail_length, positions)
    room = ((0, 0), (0, 0), (0, capacity - length), (0, 0), (0, 0))
    return prediction, jax.tree.map(lambda x: jnp.pad(x, room), live)


def _queries(state: State, tail: Tail) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors [B, K, d], maturity [B, K] and positions [B, K] of the K queries of a step."""
    batch, length, _ = state.tail.shape
    vectors = jnp.concatenate([state.last[:, None], state.tail[:, :-1]], axis=1)
    maturity = jnp.concatenate([jnp.ones((1,)), tail.maturity[:-1]])
    positions = state.num_committed[:, None] - 1 + jnp.arange(length)[None, :]
    return vectors, jnp.broadcast_to(maturity[None, :], (batch, length)), positions


def append(history: History, live: History, position: jax.Array) -> History:
    """The history with the first `live` query's keys and values written at `position` [B] of each row."""
    rows = jnp.arange(position.shape[0])

    def write(whole, new):
        return whole.at[:, rows, position].set(new[:, :, 0].astype(whole.dtype))

    return jax.tree.map(write, history, live)


def cached_predict(
    params: Params, forward: Forward, tail: Tail, told_tail_length: int, guided: bool, repelled: bool = False
) -> Predict:
    """`predict` of the decoder over a History: K query positions a step, two such passes with guidance.

    `told_tail_length` is the K that the model is told by FiLM (0 for an autoregressive backbone). The
    unconditional pass has the same queries and no history. Repulsion pushes the conditional prediction; its memory
    is that of `prefill` with `repelled`.
    """

    def told(state):
        return jnp.full(state.num_committed.shape, told_tail_length, jnp.int32)

    def conditional(state):
        vectors, maturity, positions = _queries(state, tail)
        history: History = state.memory
        visible = jnp.arange(history.key.shape[2])[None, :] < state.num_committed[:, None] - 1
        prediction, live = forward(
            params, vectors, maturity, told(state), positions, history=history, visible=visible
        )
        return prediction, append(history, live, state.num_committed - 1)

    def unconditional(state):
        vectors, maturity, positions = _queries(state, tail)
        return forward(params, vectors, maturity, told(state), positions)[0], state.memory

    seeing = repel(conditional, tail.repulsion, tail.repulsion_sharpness) if repelled else conditional
    return guide(seeing, unconditional, tail.guidance_scale) if guided else seeing
