"""The vocabulary sphere: rows e_i = R · w_i / ‖w_i‖, look-up, projection, entropy (paper §3.1, §3.4)."""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.method.ending import Barred
from tokmat_jax.products import scores_of_rows

_TINY = 1e-12
_AT_ONCE = 1 << 25
"""Maximum number of scores in memory at once (128 MB); larger products are computed in pieces of the vocabulary."""
_SMALLEST_PIECE = 1024


@struct.dataclass
class Vocabulary:
    """The vectors of the tokens as inputs (`table`) and as outputs (`readout`)."""

    table: jax.Array
    """E [V, d]: the vectors of committed tokens."""
    readout: jax.Array
    """Rows [V, d] with which a front is compared: E itself, except for an imported model with an untied head."""
    norm: jax.Array
    """‖row of the readout‖ [V]."""
    radius: float = struct.field(pytree_node=False)
    """R, the norm of the table's rows; for a raw table, the unit in which movement and noise are measured."""


def make_vocabulary(table: jax.Array, readout: jax.Array | None = None, radius: float = 1.0) -> Vocabulary:
    """A Vocabulary of `table` [V, d]; its readout is the same table unless a `readout` [V, d] is given."""
    readout = table if readout is None else readout
    return Vocabulary(table, readout, jnp.sqrt(jnp.sum(readout * readout, axis=-1) + _TINY), radius)


def sphere(weight: jax.Array, radius: float) -> jax.Array:
    """Vocabulary table E [V, d] from free rows `weight` [V, d]: every row has norm `radius`."""
    norm = jnp.sqrt(jnp.sum(weight * weight, axis=-1, keepdims=True) + _TINY)
    return radius * weight / norm


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Clean vectors e_{x} [..., d] of `ids` [...]."""
    return jnp.take(table, ids, axis=0)


def scores(z: jax.Array, table: jax.Array) -> jax.Array:
    """Inner products ⟨z, e_i⟩ [..., V] of vectors `z` [..., d]; float32."""
    return scores_of_rows(z.reshape(-1, z.shape[-1]), table).reshape(*z.shape[:-1], table.shape[0])


def unit(z: jax.Array) -> jax.Array:
    """`z` [..., d] scaled to norm 1; a zero vector stays zero."""
    return z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)


def read(
    z: jax.Array, vocabulary: Vocabulary, temperature: jax.Array | float, barred: Barred | None = None
) -> tuple[jax.Array, jax.Array]:
    """Nearest token [...] and entropy [...] in nats of vectors `z` [..., d].

    The nearest token is the projection of Algorithm 1, argmax_i ⟨z, e_i⟩, over the tokens that are not `barred` [...].
    The entropy is that of softmax(cos(z, E)/τ) over all tokens, with τ = `temperature` (paper §5).
    """
    shape = z.shape[:-1]
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32), _no_spread(shape))
    scale = _cosine_scale(z, temperature)

    def fold(carry, piece):
        best, nearest, spread = carry
        inner = piece.inner if barred is None else barred.allowed(piece.inner, piece.ids)
        own = jnp.max(inner, axis=-1)
        # NaN counts as the nearest, as in argmax.
        better = ~(own <= best)
        ids = piece.first + jnp.argmax(inner, axis=-1).astype(jnp.int32)
        return (jnp.where(better, own, best), jnp.where(better, ids, nearest),
                _spread_with(spread, piece, scale))

    _, nearest, spread = _fold(z, vocabulary, fold, start)
    return nearest, _entropy(spread)


def rank_and_entropy(z: jax.Array, target_ids: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
    """How many tokens are nearer to `z` [..., d] than `target_ids` [...], and the entropy of `read` at τ = 1.

    If a vector is not finite, its rank is V.
    """
    target = jnp.sum(z * look_up(vocabulary.readout, target_ids), axis=-1)[..., None]
    start = (jnp.zeros(target_ids.shape, jnp.int32), _no_spread(target_ids.shape))
    scale = _cosine_scale(z, 1.0)

    def fold(carry, piece):
        rank, spread = carry
        # In the product over all rows, the target's own score may be rounded differently.
        own = jnp.reshape(piece.ids, (1,) * target_ids.ndim + (-1,)) == target_ids[..., None]
        nearer = jnp.sum((piece.inner > target) & ~own, axis=-1, dtype=jnp.int32)
        return rank + nearer, _spread_with(spread, piece, scale)

    rank, spread = _fold(z, vocabulary, fold, start)
    return jnp.where(jnp.isfinite(target[..., 0]), rank, vocabulary.table.shape[0]), _entropy(spread)


@struct.dataclass
class _Piece:
    """The scores of some vectors against some rows of the readout."""

    inner: jax.Array
    """⟨z, e_i⟩ [..., P]; −∞ for a row that was already in another piece."""
    norm: jax.Array
    """‖e_i‖ [P]."""
    first: jax.Array
    """Id [] of the first row."""

    @property
    def ids(self) -> jax.Array:
        """Ids [P] of the rows."""
        return self.first + jnp.arange(self.inner.shape[-1])


def _fold(z: jax.Array, vocabulary: Vocabulary, fold, carry):
    """Folds the vocabulary with `fold(carry, piece)`, in one piece if `z` then has at most `_AT_ONCE` scores."""
    vocab_size = vocabulary.readout.shape[0]
    size = max(_SMALLEST_PIECE, _AT_ONCE // max(1, z.size // z.shape[-1]))
    if size >= vocab_size:
        return fold(carry, _Piece(scores(z, vocabulary.readout), vocabulary.norm, jnp.int32(0)))

    def body(index, carry):
        # The last piece begins early enough to be whole.
        first = jnp.minimum(index * size, vocab_size - size).astype(jnp.int32)
        rows, norm = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (vocabulary.readout, vocabulary.norm))
        inner = scores(z, rows)
        new = jnp.reshape(first + jnp.arange(size) >= index * size, (1,) * (inner.ndim - 1) + (-1,))
        return fold(carry, _Piece(jnp.where(new, inner, -jnp.inf), norm, first))

    return jax.lax.fori_loop(0, -(-vocab_size // size), body, carry)


def _cosine_scale(z: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Divisor [..., 1] that turns ⟨z, e_i⟩/‖e_i‖ into cos/τ."""
    return jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY) * temperature


def _no_spread(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape)


def _spread_with(spread, piece: _Piece, scale: jax.Array):
    """`spread` with a `piece` added: m = max x for x = cos/τ, Σ exp(x − m) and Σ (x − m) exp(x − m), all [...]."""
    largest, total, slope = spread
    norm = jnp.reshape(piece.norm, (1,) * (piece.inner.ndim - 1) + (-1,))
    x = piece.inner / (scale * norm)
    new = jnp.maximum(largest, jnp.max(x, axis=-1))
    below = x - new[..., None]
    weight = jnp.exp(below)
    # Before the first piece there is nothing to scale down, and an excluded row has no weight.
    drop = jnp.where(jnp.isneginf(largest), 0.0, largest - new)
    shrink = jnp.where(jnp.isneginf(largest), 0.0, jnp.exp(drop))
    counted = jnp.where(jnp.isneginf(below), 0.0, below * weight)
    return (new, shrink * total + jnp.sum(weight, axis=-1),
            shrink * (slope + drop * total) + jnp.sum(counted, axis=-1))


def _entropy(spread) -> jax.Array:
    """H = log Σ exp(x − m) − Σ (x − m) exp(x − m) / Σ exp(x − m)."""
    _, total, slope = spread
    return jnp.log(total) - slope / total


def candidates(z: jax.Array, vocabulary: Vocabulary, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` nearest tokens [..., count] of vectors `z` [..., d] by ⟨z, e_i⟩, and their cosines [..., count]."""
    if count == 0:
        empty = (*z.shape[:-1], 0)
        return jnp.zeros(empty, jnp.int32), jnp.zeros(empty)
    inner, ids = jax.lax.top_k(scores(z, vocabulary.readout), count)
    length = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY)
    return ids, inner / (length * look_up(vocabulary.norm, ids))


def nearest_entropy(z: jax.Array, vocabulary: Vocabulary, count: int, temperature: jax.Array | float) -> jax.Array:
    """Entropy [...] in nats of softmax(cos/τ) over the `count` nearest tokens (at most V) of vectors `z` [..., d]."""
    _, cosine = candidates(z, vocabulary, min(count, vocabulary.table.shape[0]))
    log_p = jax.nn.log_softmax(cosine / temperature, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def entropy_of(
    inner: jax.Array, z: jax.Array, vocabulary: Vocabulary, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Entropy [...] in nats of softmax(cos(z, E)/τ), from `inner` = ⟨z, e_i⟩ [..., V] of `z` [..., d]."""
    length = jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + _TINY) * temperature
    norm = jnp.reshape(vocabulary.norm, (1,) * (inner.ndim - 1) + (-1,))
    log_p = jax.nn.log_softmax(inner / (length * norm), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
