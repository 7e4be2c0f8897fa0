"""One attention for training, prefill and decoding."""

import jax
import jax.numpy as jnp
from flax import struct


def causal_mask(seq_len: int) -> jax.Array:
    """[1, T, T] bool: query t may see keys up to t."""
    return jnp.tril(jnp.ones((1, seq_len, seq_len), bool))


@struct.dataclass
class History:
    """Keys and values of committed positions; they never change (METHOD §4, exact caching).

    Index s of the capacity S holds position s. Entries from a row's last committed position on are not valid
    yet: whoever reads masks them.
    """

    key: jax.Array
    """[L, B, S, H_kv, D], or [B, S, H_kv, D] inside one layer."""
    value: jax.Array
    """As `key`."""


def attend(
    query: jax.Array, live: History, mask: jax.Array | None, history: History | None, visible: jax.Array | None
) -> jax.Array:
    """Softmax attention of `query` [B, T, H, D] over the `live` positions and, before them, a `history`.

    `mask` [B or 1, T, T] bool says which live keys a query sees, None is causal. `visible` [B, S] bool says which
    entries of the history every query of the row sees. The two parts share one softmax without being copied
    into one array. H may be a multiple of the keys' H_kv: query head h reads head h // (H / H_kv). Returns
    [B, T, H, D]; the softmax is taken in float32.
    """
    if history is None:
        return jax.nn.dot_product_attention(
            query, live.key, live.value, mask=None if mask is None else mask[:, None], is_causal=mask is None
        )
    assert visible is not None
    if mask is None:
        mask = causal_mask(query.shape[1])
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, live.key.shape[2], -1, size)
    past = _masked_scores(grouped, history.key, visible[:, None, None, None, :])
    now = _masked_scores(grouped, live.key, mask[:, None, None])
    weight = jax.nn.softmax(jnp.concatenate([past, now], axis=-1), axis=-1).astype(query.dtype)
    capacity = past.shape[-1]
    seen = jnp.einsum("bhgts,bshd->bthgd", weight[..., :capacity], history.value) + jnp.einsum(
        "bhgts,bshd->bthgd", weight[..., capacity:], live.value
    )
    return seen.reshape(batch, length, heads, size)


def _masked_scores(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores [B, H_kv, G, T, S] of `query` [B, T, H_kv, G, D] against `key` [B, S, H_kv, D]."""
    scale = query.shape[-1] ** -0.5
    scores = scale * jnp.einsum("bthgd,bshd->bhgts", query, key, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
