"""The liquid tail without a model: maturity profiles, the simulated tail of training, and the four moves of
Algorithm 1 (contract, commit, shift, birth).

    position   0 ………………… T-K-1 | T-K …………………… T-1
    slot                       |  0    1   …   K-1        front first
    maturity   1  1  1  …   1  | α_max    …    towards 0
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import MaturationConfig, Profile


def profile_maturity(slot: jax.Array, tail_length: jax.Array, profile: Profile, max_maturity: float | jax.Array):
    """Maturity α_j of `slot` j in a tail of `tail_length` K (METHOD §3); broadcasts, values in [0, α_max].

    `linear`: α_max (1 − j/K); `cosine`: α_max cos(πj / 2K); `constant`: α_max.
    """
    depth = slot / jnp.maximum(tail_length, 1)
    match profile:
        case "linear":
            share = 1.0 - depth
        case "cosine":
            share = jnp.cos(0.5 * jnp.pi * depth)
        case "constant":
            share = jnp.ones_like(depth)
    return max_maturity * share


def window_maturity(tail_length: jax.Array, seq_len: int, profile: Profile, max_maturity: float) -> jax.Array:
    """Maturity [B, T] of windows whose last `tail_length` [B] positions are liquid; 1 before them."""
    tail_length = tail_length[:, None]
    slot = jnp.arange(seq_len)[None, :] - (seq_len - tail_length)
    return jnp.where(slot < 0, 1.0, profile_maturity(slot, tail_length, profile, max_maturity))


def noise_vector(key: jax.Array, shape: tuple[int, ...], tail_noise: float | jax.Array, radius: float) -> jax.Array:
    """σ · R · ε/√d with ε ~ N(0, I): vectors of `shape` [..., d] whose norm is about σ R."""
    return tail_noise * radius * jax.random.normal(key, shape) / jnp.sqrt(float(shape[-1]))


def corrupt(clean: jax.Array, noise: jax.Array, maturity: jax.Array) -> jax.Array:
    """z = α e + (1 − α) · noise for `clean` and `noise` [..., d] and `maturity` [...] (Eq. 2)."""
    alpha = maturity[..., None]
    return alpha * clean + (1.0 - alpha) * noise


@struct.dataclass
class TailDraw:
    """The random draws for a batch of training windows; row b depends on its own key alone."""

    tail_length: jax.Array
    """K [B], 0 if the row has no tail."""
    noise: jax.Array
    """σ R ε/√d [B, K_max, d] for the last K_max positions."""
    history_dropped: jax.Array
    """[B] bool: from the last committed position on, nothing before it may be seen."""
    self_conditioned: jax.Array
    """[B] bool: the tail is built from the model's own predictions."""


def draw_tail(row_keys: jax.Array, config: MaturationConfig, embed_dim: int, radius: float) -> TailDraw:
    """Draws K ~ U{1..K_max} (or 0), the noise and the two dropouts for each of `row_keys` [B] (METHOD §3)."""

    def draw_row(key):
        length_key, none_key, noise_key, history_key, self_key = jax.random.split(key, 5)
        length = jax.random.randint(length_key, (), 1, config.max_tail_length + 1)
        return TailDraw(
            tail_length=jnp.where(jax.random.bernoulli(none_key, config.no_tail_prob), 0, length),
            noise=noise_vector(noise_key, (config.max_tail_length, embed_dim), config.tail_noise, radius),
            history_dropped=jax.random.bernoulli(history_key, config.history_dropout),
            self_conditioned=jax.random.bernoulli(self_key, config.self_condition_prob),
        )

    return jax.vmap(draw_row)(row_keys)


def mix_tail(content: jax.Array, noise: jax.Array, maturity: jax.Array) -> jax.Array:
    """Windows z [B, T, d] whose last positions are corrupted.

    `content` [B, T, d] is what matures (the truth, or the model's predictions), `noise` [B, K_max, d] belongs to
    the last K_max positions, `maturity` is [B, T] and 1 at committed positions.
    """
    start = content.shape[1] - noise.shape[1]
    tail = corrupt(content[:, start:], noise, maturity[:, start:])
    return jnp.concatenate([content[:, :start], tail], axis=1)


def contract(tail: jax.Array, prediction: jax.Array, rate: jax.Array) -> jax.Array:
    """z̃_j ← z̃_j + η_j (ẑ_j − z̃_j) for `tail` and `prediction` [B, K, d] and `rate` η [K] (Algorithm 1)."""
    return tail + rate[None, :, None] * (prediction - tail)


def shift(slots: jax.Array, entering: jax.Array, count: jax.Array) -> jax.Array:
    """`slots` [B, K, …] without the first `count` [B] of them: the others move up, and as many of `entering` [B, M, …]
    follow at the back; 0 ≤ count ≤ M."""
    index = count[:, None] + jnp.arange(slots.shape[1])[None, :]
    index = jnp.reshape(index, index.shape + (1,) * (slots.ndim - 2))
    return jnp.take_along_axis(jnp.concatenate([slots, entering], axis=1), index, axis=1)


def movement(before: jax.Array, after: jax.Array, radius: float) -> jax.Array:
    """‖Δz̃‖/R [...] between two states [..., d] of the same vectors (METHOD §5)."""
    return jnp.linalg.norm(after - before, axis=-1) / radius
