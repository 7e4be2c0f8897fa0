"""Attention against its definition in NumPy: blocks of queries, the masked end, shared heads, the other kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.model.attention import LayerCache, Sight, attend, causal_mask

B, D = 2, 8


def example(length, heads, kv_heads):
    keys = jax.random.split(jax.random.key(length), 3)
    return (jax.random.normal(keys[0], (B, heads, length, D)),
            LayerCache(*(jax.random.normal(key, (B, kv_heads, length, D)) for key in keys[1:])))


def by_definition(query, live, mask):
    """[B, H, T, D] of `mask` [B, T, T], in float64, one head after the other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, live.key, live.value))
    out, group = np.zeros(query.shape), query.shape[1] // key.shape[1]
    for b, h in np.ndindex(query.shape[:2]):
        scores = np.where(mask[b], query[b, h] @ key[b, h // group].T / np.sqrt(D), -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, h] = weight / weight.sum(-1, keepdims=True) @ value[b, h // group]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1100])
def test_causal_attention_in_blocks_is_its_definition(length, heads, kv_heads):
    query, live = example(length, heads, kv_heads)
    mask = np.broadcast_to(causal_mask(length), (B, length, length))
    # Means of values of size 1 in float32.
    np.testing.assert_allclose(attend(query, live), by_definition(query, live, mask), atol=2e-6)


@pytest.mark.parametrize("kernel", ["xla", "cudnn"])
@pytest.mark.parametrize("count", [1, 17, 140, 300])
def test_the_last_queries_have_a_mask_of_their_own(monkeypatch, kernel, count):
    # The library's own kernel stands in for cuDNN, which needs a GPU; what is called with what layout stays.
    monkeypatch.setattr(jax.nn, "dot_product_attention", functools.partial(plain, jax.nn.dot_product_attention))
    length = 300
    query, live = example(length, 4, 2)
    whole = np.array(np.broadcast_to(causal_mask(length), (B, length, length)))
    whole[1, length - count :, : length - count] = False
    got = attend(query, live, jnp.asarray(whole[:, length - count :]), kernel=kernel)
    np.testing.assert_allclose(got, by_definition(query, live, whole), atol=2e-6)


def plain(attention, *args, implementation, **kwargs):
    assert implementation == "cudnn"
    return attention(*args, implementation="xla", **kwargs)


def test_a_history_and_live_positions_share_one_softmax():
    length, old = 12, 7
    query, live = example(length, 4, 2)
    past = LayerCache(*(jnp.pad(x[:, :, :old], ((0, 0), (0, 0), (0, 5), (0, 0)), constant_values=9.0)
                     for x in (live.key, live.value)))
    now = LayerCache(live.key[:, :, old:], live.value[:, :, old:])
    got = attend(query[:, :, old:], now, None, past, jnp.full((B,), old))
    np.testing.assert_allclose(got, attend(query, live)[:, :, old:], atol=2e-6)


@pytest.mark.parametrize(("window", "capacity"), [(4, 4), (4, 6), (1, 3), (7, 7)])
@pytest.mark.parametrize("old", [0, 1, 3, 7, 11])
def test_a_cache_that_wraps_holds_what_a_window_sees(window, capacity, old):
    length = old + 1
    query, live = example(length, 4, 2)
    filled = np.full((2, B, 2, capacity, D), 9.0, np.float32)
    for position in range(old):  # the oldest are overwritten
        filled[:, :, :, position % capacity] = np.stack([live.key, live.value])[:, :, :, position]
    past, now = LayerCache(*jnp.asarray(filled), wraps=True), LayerCache(live.key[:, :, old:], live.value[:, :, old:])
    sight = Sight(jnp.full((B, 1), old), window)
    whole = Sight(jnp.broadcast_to(jnp.arange(length)[None], (B, length)), window)
    np.testing.assert_allclose(attend(query[:, :, old:], now, None, past, jnp.full((B,), old), sight=sight),
                               attend(query, live, sight=whole)[:, :, old:], atol=2e-6)
