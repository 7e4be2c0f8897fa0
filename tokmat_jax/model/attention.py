"""One attention for training, prefill and decoding; the kernel for its causal part is configurable."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import AttentionKernel

_BLOCK = 128
"""Queries per block of causal attention; a block does not score keys that none of its queries may see."""
_MOST_BLOCKS = 8


def causal_mask(seq_len: int) -> jax.Array:
    """[1, T, T] bool: query t may see keys up to t."""
    return jnp.tril(jnp.ones((1, seq_len, seq_len), bool))


def history_mask(
    seq_len: int, num_committed: jax.Array, dropped: jax.Array, num_queries: int | None = None
) -> jax.Array:
    """[B, Q, T] bool: what the last `num_queries` Q (None: all) of T positions see.

    The mask is causal. In rows that are `dropped` [B], queries from the last committed position on see nothing before
    it. `num_committed` [B] counts the committed positions, so the last one is num_committed − 1.
    """
    last = num_committed[:, None, None] - 1
    position = jnp.arange(seq_len)
    first = 0 if num_queries is None else seq_len - num_queries
    query, key = position[None, first:, None], position[None, None, :]
    hidden = dropped[:, None, None] & (query >= last) & (key < last)
    return causal_mask(seq_len)[:, first:] & ~hidden


@struct.dataclass
class LayerCache:
    """Keys and values of committed positions in one layer; they never change (METHOD §4, exact caching).

    Entry s of the capacity S holds position s. If the cache `wraps`, it holds the newest position that is congruent to
    s modulo S, so that a layer with a window needs no room for the whole history. Entries from a row's last committed
    position on are not valid yet: readers must mask them.
    """

    key: jax.Array
    """[B, H_kv, S, D]."""
    value: jax.Array
    """As `key`."""
    wraps: bool = struct.field(pytree_node=False, default=False)

    @property
    def capacity(self) -> int:
        """S."""
        return self.key.shape[2]

    def held(self, num_committed: jax.Array) -> jax.Array:
        """The position [B, S] that each entry holds if the first `num_committed` n [B] are committed; negative for
        none."""
        entry, last = jnp.arange(self.capacity)[None, :], num_committed[:, None] - 1
        if self.wraps:
            return last - (last - entry) % self.capacity
        return jnp.where(entry <= last, entry, -1)


@dataclasses.dataclass(frozen=True)
class Sight:
    """How far a layer sees, and how it weighs what it sees."""

    positions: jax.Array | None = None
    """Positions [B, T] of the queries; needed with a window."""
    window: jax.Array | int | None = None
    """Number of positions that a query sees, its own included; None: all."""
    scale: float | None = None
    """Factor of the scores; None: D^-1/2."""

    def near(self, query: jax.Array | None, key: jax.Array | None, last: int | None = None) -> jax.Array | bool:
        """[B or 1, Q, S] bool: which keys at positions `key` [B or 1, S] lie in the window of the queries at `query`
        [B or 1, T], of which only the `last` Q count (None: all)."""
        if self.window is None or query is None or key is None:
            return True
        query = query if last is None else query[:, query.shape[1] - last :]
        return query[:, :, None] - key[:, None, :] < self.window


def attend(
    query: jax.Array, live: LayerCache, mask: jax.Array | None = None, history: LayerCache | None = None,
    num_visible: jax.Array | None = None, kernel: AttentionKernel = "xla", sight: Sight = Sight(),
) -> jax.Array:
    """Softmax attention of `query` [B, H, T, D] over the T `live` positions and, before them, a `history`.

    `mask` [B or 1, Q, T] bool says which live keys the last Q queries see; the other queries are causal, as are all if
    it is None. Every query of a row sees the first `num_visible` [B] positions of the history. The two parts share one
    softmax without being copied into one array. A history may have fewer rows, B / M: row b then reads row b // M.
    H may be a multiple of the keys' H_kv: query head h reads head h // (H / H_kv). `sight` narrows what the masks allow
    and scales the scores. Returns [B, H, T, D]; the softmax is taken in float32.
    """
    batch, _, length, size = query.shape
    grouped = query.reshape(batch, live.key.shape[1], -1, length, size)
    if history is not None:
        assert num_visible is not None
        seen = _with_history(grouped, live, causal_mask(length) if mask is None else mask, history, num_visible, sight)
        return seen.reshape(query.shape)
    count = 0 if mask is None else mask.shape[1]
    parts = [] if count == length else [_causal(grouped, live, kernel, sight)[..., : length - count, :]]
    if mask is not None:
        mask = mask & sight.near(sight.positions, sight.positions, mask.shape[1])
        parts.append(_masked(grouped[..., length - count :, :], live.key, live.value, mask, sight.scale))
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)).reshape(query.shape)


def _causal(query: jax.Array, live: LayerCache, kernel: AttentionKernel, sight: Sight) -> jax.Array:
    """Causal attention of `query` [B, H_kv, G, T, D] at consecutive positions, by blocks of queries or by cuDNN's flash
    attention."""
    batch, _, _, length, size = query.shape
    if kernel == "cudnn":
        # The library wants [B, T, H, D]; a transposition is a choice of layout for the compiler.
        by_time = (x.reshape(batch, -1, length, size).swapaxes(1, 2) for x in (query, live.key, live.value))
        seen = jax.nn.dot_product_attention(*by_time, is_causal=True, scale=sight.scale,
                                            implementation="cudnn")
        return seen.swapaxes(1, 2).reshape(query.shape)
    block = max(_BLOCK, -(-length // _MOST_BLOCKS))
    index, parts = jnp.arange(length)[None, :], []
    causal = causal_mask(length) & sight.near(index, index)
    for begin in range(0, length, block):
        end = min(begin + block, length)
        parts.append(_masked(query[..., begin:end, :], live.key[:, :, :end], live.value[:, :, :end],
                             causal[:, begin:end, :end], sight.scale))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)


def _masked(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float | None
) -> jax.Array:
    """Attention [B, H_kv, G, Q, D] of `query` [B, H_kv, G, Q, D] over [B, H_kv, T, D] as `mask` [B or 1, Q, T] says."""
    weight = jax.nn.softmax(_masked_scores(query, key, mask[:, None, None], scale), axis=-1).astype(query.dtype)
    return jnp.einsum("bhgts,bhsd->bhgtd", weight, value)


def _with_history(
    query: jax.Array, live: LayerCache, mask: jax.Array, history: LayerCache, num_visible: jax.Array, sight: Sight
) -> jax.Array:
    batch, heads, groups, length, _ = query.shape
    rows, capacity = history.key.shape[0], history.capacity
    shared = batch // rows

    def together(x):
        """[B, …, T, S] → [B / M, …, M T, S]: rows that share a history become one."""
        x = jnp.moveaxis(x.reshape(rows, shared, heads, groups, length, x.shape[-1]), 1, 3)
        return x.reshape(rows, heads, groups, shared * length, x.shape[-1])

    def apart(x):
        x = jnp.moveaxis(x.reshape(rows, heads, groups, shared, length, x.shape[-1]), 3, 1)
        return x.reshape(batch, heads, groups, length, x.shape[-1])

    held = history.held(num_visible)
    seen = (held >= 0)[:, None, :] & sight.near(sight.positions, held)
    seen = jnp.broadcast_to(seen, (batch, length, capacity)).reshape(rows, 1, 1, shared * length, capacity)
    past = _masked_scores(together(query), history.key, seen, sight.scale)
    mask = mask & sight.near(sight.positions, sight.positions)
    now = together(_masked_scores(query, live.key, mask[:, None, None], sight.scale))
    weight = jax.nn.softmax(jnp.concatenate([past, now], axis=-1), axis=-1).astype(query.dtype)
    return apart(jnp.einsum("bhgts,bhsd->bhgtd", weight[..., :capacity], history.value)) + jnp.einsum(
        "bhgts,bhsd->bhgtd", apart(weight[..., capacity:]), live.value
    )


def _masked_scores(query: jax.Array, key: jax.Array, mask: jax.Array, scale: float | None) -> jax.Array:
    """Scores [B, H_kv, G, Q, S] of `query` [B, H_kv, G, Q, D] against `key` [B, H_kv, S, D]; float32."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * jnp.einsum("bhgtd,bhsd->bhgts", query, key, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
