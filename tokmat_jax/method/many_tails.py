"""Many tails per window: the tails of training stand at random anchors, beside a window of clean vectors (METHOD §3).

    position   0 … n−2    n−1     n     n+1   …  n+K−2
    window     e     e    e_n−1   (clean; it never reads a tail)
    tail                  e_n−1   z_0   z_1   …  z_K−2       its own copy of token n − 1, and its slots
    target                x_n     x_n+1 x_n+2 …  x_n+K−1

A tail reads the window before its copy, and itself: the queries of a step of the decoder. What its slots hold is what
decoding shows: embryos, or the model's own vectors from a pass a positions earlier, moved up by a.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import MaturationConfig
from tokmat_jax.config.training import MOST_MOVED
from tokmat_jax.method.maturation import corrupt, noise_vector, profile_maturity


@struct.dataclass
class TailsDraw:
    """The random draws for the M tails of every window; those of window b depend on its own key alone."""

    anchor: jax.Array
    """n [B, M], position of the front."""
    moved: jax.Array
    """a [B, M] in 1..MOST_MOVED."""
    noise: jax.Array
    """σ R ε/√d [B, M, K + MOST_MOVED, d]; entry i is the embryo at position n − a + i."""
    self_conditioned: jax.Array
    """[B, M] bool: the slots hold the model's own vectors, else embryos."""
    history_dropped: jax.Array
    """[B, M] bool: the tail sees only itself."""


def draw_tails(
    row_keys: jax.Array, config: MaturationConfig, seq_len: int, embed_dim: int, radius: float
) -> TailsDraw:
    """Draws the tails of the windows of `row_keys` [B]. Every target of a tail lies within its window of `seq_len`."""
    count, length = config.num_tails, config.max_tail_length

    def draw_row(key):
        anchor_key, moved_key, noise_key, self_key, history_key = jax.random.split(key, 5)
        return TailsDraw(
            anchor=jax.random.randint(anchor_key, (count,), 1 + MOST_MOVED, seq_len - length + 1),
            moved=jax.random.randint(moved_key, (count,), 1, MOST_MOVED + 1),
            noise=noise_vector(noise_key, (count, length + MOST_MOVED, embed_dim), config.tail_noise, radius),
            self_conditioned=jax.random.bernoulli(self_key, config.self_condition_prob, (count,)),
            history_dropped=jax.random.bernoulli(history_key, config.history_dropout, (count,)),
        )

    return jax.vmap(draw_row)(row_keys)


def slot_maturity(config: MaturationConfig) -> jax.Array:
    """α [K − 1] of the slots of a tail that are read, front first: all but the last."""
    length = config.max_tail_length
    return profile_maturity(jnp.arange(length - 1), jnp.int32(length), config.profile, jnp.float32(config.max_maturity))


def embryo_slots(draw: TailsDraw, count: int) -> jax.Array:
    """The first `count` slots [B, M, count, d] at the anchors, all of them embryos."""
    return jnp.take_along_axis(draw.noise, _moved_up(draw, count)[..., None], axis=2)


def earlier_slots(draw: TailsDraw, count: int) -> jax.Array:
    """The first `count` slots [B, M, count, d] of the pass at n − a: the same embryos, a slots further back."""
    return draw.noise[:, :, :count]


def matured_slots(draw: TailsDraw, own: jax.Array, maturity: jax.Array) -> jax.Array:
    """The slots [B, M, K − 1, d] at the anchors: `own` [B, M, K, d], the vectors that the earlier pass predicted for
    the positions from n − a on, mixed with their embryos by `maturity` [K − 1]; embryos beyond them."""
    count = own.shape[2]
    index, noise = _moved_up(draw, count - 1), embryo_slots(draw, count - 1)
    content = jnp.take_along_axis(own, jnp.minimum(index, count - 1)[..., None], axis=2)
    known = draw.self_conditioned[:, :, None] & (index < count)
    mixed = corrupt(content, noise, jnp.broadcast_to(maturity[None, None, :], known.shape))
    return jnp.where(known[..., None], mixed, noise)


def _moved_up(draw: TailsDraw, count: int) -> jax.Array:
    """The slot [B, M, count] that each of the first `count` slots was at n − a."""
    return draw.moved[:, :, None] + jnp.arange(count)[None, None, :]
