"""The vocabulary sphere: rows e_i = R · w_i / ‖w_i‖, look-up, projection, entropy (paper §3.1, §3.4)."""

import jax
import jax.numpy as jnp
from flax import struct

_TINY = 1e-12


@struct.dataclass
class Vocabulary:
    """What tokens are when they are read and when they are written."""

    table: jax.Array
    """E [V, d]: the vector that a token is once it is committed."""
    readout: jax.Array
    """Rows [V, d] with which a front is compared. E itself, but for an imported model with an untied head."""
    norm: jax.Array
    """‖row of the readout‖ [V]."""


def make_vocabulary(table: jax.Array, readout: jax.Array | None = None) -> Vocabulary:
    """A Vocabulary of `table` [V, d], read with the same rows unless a `readout` [V, d] is given."""
    readout = table if readout is None else readout
    return Vocabulary(table, readout, jnp.sqrt(jnp.sum(readout * readout, axis=-1) + _TINY))


def sphere(weight: jax.Array, radius: float) -> jax.Array:
    """Vocabulary table E [V, d] from free rows `weight` [V, d]: every row has norm `radius`."""
    norm = jnp.sqrt(jnp.sum(weight * weight, axis=-1, keepdims=True) + _TINY)
    return radius * weight / norm


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Clean vectors e_{x} [..., d] of `ids` [...]."""
    return jnp.take(table, ids, axis=0)


def scores(z: jax.Array, table: jax.Array) -> jax.Array:
    """Inner products ⟨z, e_i⟩ [..., V] of vectors `z` [..., d]; float32."""
    return jnp.einsum("...d,vd->...v", z, table, preferred_element_type=jnp.float32)


def unit(z: jax.Array) -> jax.Array:
    """`z` [..., d] scaled to norm 1; a zero vector stays zero."""
    return z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)


def read(z: jax.Array, vocabulary: Vocabulary, temperature: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """What vectors `z` [..., d] would say: nearest token [...] and entropy [...] in nats.

    The nearest token is the projection of Algorithm 1, argmax_i ⟨z, e_i⟩.
    The entropy is that of softmax(cos(z, E)/τ) with τ = `temperature` (paper §5).
    """
    inner = scores(z, vocabulary.readout)
    return jnp.argmax(inner, axis=-1).astype(jnp.int32), entropy_of(inner, z, vocabulary, temperature)


def candidates(z: jax.Array, vocabulary: Vocabulary, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` nearest tokens [..., count] of vectors `z` [..., d] by ⟨z, e_i⟩, and their cosines [..., count]."""
    if count == 0:
        empty = (*z.shape[:-1], 0)
        return jnp.zeros(empty, jnp.int32), jnp.zeros(empty)
    inner, ids = jax.lax.top_k(scores(z, vocabulary.readout), count)
    length = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)
    return ids, inner / (length * look_up(vocabulary.norm, ids))


def entropy_of(
    inner: jax.Array, z: jax.Array, vocabulary: Vocabulary, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Entropy [...] in nats of softmax(cos(z, E)/τ), from `inner` = ⟨z, e_i⟩ [..., V] of `z` [..., d]."""
    length = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY) * temperature
    norm = jnp.reshape(vocabulary.norm, (1,) * (inner.ndim - 1) + (-1,))
    log_p = jax.nn.log_softmax(inner / (length * norm), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
