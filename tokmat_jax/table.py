"""The vocabulary sphere: rows e_i = R · w_i / ‖w_i‖, look-up, projection, entropy (paper §3.1, §3.4)."""

import jax
import jax.numpy as jnp

_TINY = 1e-12


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


def cosines(z: jax.Array, table: jax.Array) -> jax.Array:
    """cos(z, e_i) [..., V] of vectors `z` [..., d]."""
    return scores(unit(z), unit(table))


def unit(z: jax.Array) -> jax.Array:
    """`z` [..., d] scaled to norm 1; a zero vector stays zero."""
    return z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)


def read(z: jax.Array, table: jax.Array, radius: float, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What vectors `z` [..., d] would say: nearest token [...] and entropy [...] in nats.

    The nearest token is the projection of Algorithm 1, argmax_i ⟨z, e_i⟩.
    The entropy is that of softmax(cos(z, E)/τ) with τ = `temperature` (paper §5); it needs a table whose
    rows all have norm `radius`, since one matrix product serves both.
    """
    inner = scores(z, table)
    norm = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)
    log_p = jax.nn.log_softmax(inner / (norm * radius * temperature), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.argmax(inner, axis=-1).astype(jnp.int32), entropy
