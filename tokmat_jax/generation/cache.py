"""The Transformer as a `predict` for the decoder, with exact caching (METHOD §4).

Committed positions have maturity 1 and K is constant, and attention is causal: their keys and values never change. A
step predicts positions n .. n+K−1, so it needs the outputs at n−1 .. n+K−2: the token committed last and all slots
but the last. Only the first of these K queries is added to the history.

If a step may commit up to C settled tokens, the C newest committed positions are queries, so that shapes stay fixed.
Those already in the history are written again with the same values. M drafts under verification are queries too, and
are written as if they were committed: accepted drafts stay, and rejected ones are overwritten before any query reads
them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokmat_jax.config import ModelConfig
from tokmat_jax.method.algorithm import DecodeState, Predict
from tokmat_jax.method.guidance import guide
from tokmat_jax.method.repulsion import Remembering, begin_trace, repel
from tokmat_jax.method.tail import Tail
from tokmat_jax.model.attention import LayerCache, causal_mask
from tokmat_jax.model.backbone import KVCache, Model, layers_of


@dataclass(frozen=True)
class Room:
    """How many positions a history has room for."""

    capacity: int
    """Positions that a sample may have."""
    layers: tuple[int, ...]
    """Entries of each layer's cache. One with fewer than `capacity` wraps: it holds the positions of its window, and as
    many as a pass writes, so that rejected drafts overwrite nothing that is still seen."""


def room_of(model: ModelConfig, capacity: int, at_once: int) -> Room:
    """Room for `capacity` positions of a `model`, of which a pass writes up to `at_once`."""
    windowed, window = set(model.windowed_layers), model.attention_window or capacity
    return Room(capacity, tuple(min(capacity, window + at_once) if layer in windowed else capacity
                                for layer in range(model.num_layers)))


def written_at_once(tail: Tail, max_commit: int) -> int:
    """How many positions a step writes that may commit `max_commit` settled tokens: those, and its drafts."""
    return max_commit + (0 if tail.verification is None else tail.verification.num_drafts)


def prefill(
    model: Model, vectors: jax.Array, tail_length: jax.Array, lengths: jax.Array, room: Room, repelled: bool = False
) -> KVCache | Remembering:
    """Keys and values of prompts [B, P, d] of `lengths` [B] up to P ≤ `room.capacity`, with the trace of repulsion if
    the decoder is `repelled`.

    The padding after the end of a row may be anything: it is overwritten before it is read.
    """
    prediction, history = read_prompts(model, vectors, tail_length, lengths, room)
    return Remembering(history, begin_trace(prediction, vectors, room.capacity)) if repelled else history


def read_prompts(
    model: Model, vectors: jax.Array, tail_length: jax.Array, lengths: jax.Array, room: Room
) -> tuple[jax.Array, KVCache]:
    """As `prefill`, but returns (predictions [B, P, d], history)."""
    batch, length, _ = vectors.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
    prediction, live = model(vectors, jnp.ones((batch, length)), tail_length, positions)
    return prediction, tuple(_kept(layer, lengths, size, size < room.capacity)
                             for layer, size in zip(layers_of(live), room.layers, strict=True))


def _kept(live: LayerCache, lengths: jax.Array, size: int, wraps: bool) -> LayerCache:
    """A cache with `size` entries that holds what it has room for of `live` [B, H, P, D], of rows of `lengths` [B]."""
    count = live.capacity
    if size >= count:
        padded = ((0, 0), (0, 0), (0, size - count), (0, 0))
        return LayerCache(jnp.pad(live.key, padded), jnp.pad(live.value, padded), wraps)
    whole = LayerCache(live.key[:, :, :size], live.value[:, :, :size], wraps)
    index = jnp.maximum(whole.held(lengths), 0)[:, None, :, None]
    key, value = (jnp.take_along_axis(x, index, axis=2) for x in (live.key, live.value))
    return LayerCache(key, value, wraps)


@dataclass(frozen=True)
class _Queries:
    """The queries of a step: the C newest committed positions, M drafts, all slots but the last."""

    vectors: jax.Array
    """[B, C + M + K − 1, d]."""
    maturity: jax.Array
    """α [B, C + M + K − 1]; 1 for committed positions and drafts."""
    tail_length: jax.Array
    """K that the model is given at each position, [B, C + M + K − 1]."""
    positions: jax.Array
    """[B, C + M + K − 1]; negative if a row has n < C. Drafts and slots have the same positions."""


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
    """[1, Q, Q] bool: which queries of a step see which. Drafts see the newest positions and earlier drafts; slots see
    the newest positions and earlier slots, never a draft. In the unconditional pass a draft sees only itself."""
    committed = newest + drafts
    mask = causal_mask(committed + slots)
    mask = mask.at[:, committed:, newest:committed].set(False)
    if unconditional:
        mask = mask.at[:, newest:committed, :committed].set(jnp.eye(committed, dtype=bool)[None, newest:])
    return mask


def append(history: KVCache, live: KVCache, positions: jax.Array) -> KVCache:
    """The history with the keys and values of the first M `live` queries written at `positions` [B, M] of each row.
    Queries at negative positions are not written."""
    rows, count = jnp.arange(positions.shape[0])[:, None], positions.shape[1]

    def written(layer: LayerCache, new: LayerCache) -> LayerCache:
        entry = positions % layer.capacity if layer.wraps else positions
        place = jnp.where(positions < 0, layer.capacity, entry)
        key, value = (whole.at[rows, :, place].set(part[:, :, :count].swapaxes(1, 2).astype(whole.dtype), mode="drop")
                      for whole, part in ((layer.key, new.key), (layer.value, new.value)))
        return LayerCache(key, value, layer.wraps)

    return tuple(written(*pair) for pair in zip(history, live, strict=True))


def cached_predict(model: Model, tail: Tail) -> Predict:
    """`predict` of the decoder over a KV cache: each step has C + M + K − 1 query positions, for the C positions that a
    step may commit and M drafts (C = 1 if M > 0), and M + K more with guidance.

    The unconditional pass has the last committed position, the same drafts and the same slots, and no history.
    Repulsion pushes the conditional prediction; its memory comes from `prefill` with `repelled`.
    """

    def conditional(state):
        newest, drafts = state.recent.shape[1], 0 if state.drafts is None else state.drafts.vectors.shape[1]
        asked = _queries(state, tail, newest)
        history: KVCache = state.memory
        num_visible = state.num_committed - newest
        mask = None
        if newest > 1 or drafts:
            mask = _mask(newest, drafts, state.tail.shape[1] - 1) & (asked.positions >= 0)[:, None, :]
        prediction, live = model(asked.vectors, asked.maturity, asked.tail_length, jnp.maximum(asked.positions, 0),
                                 mask, history=history, num_visible=num_visible)
        return prediction, append(history, live, asked.positions[:, : newest + drafts])

    def unconditional(state):
        asked, drafts = _queries(state, tail, 1), 0 if state.drafts is None else state.drafts.vectors.shape[1]
        mask = _mask(1, drafts, state.tail.shape[1] - 1, unconditional=True) if drafts else None
        return model(asked.vectors, asked.maturity, asked.tail_length, asked.positions, mask)[0], state.memory

    seeing = conditional if tail.repulsion is None else repel(conditional, tail.repulsion)
    return seeing if tail.guidance is None else guide(seeing, unconditional, tail.guidance)
