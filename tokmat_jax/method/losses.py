"""MSE on the sphere, InfoNCE with its negatives, the baseline's cross-entropy (METHOD §3).

Each loss has a plain form per position. Training uses the sums over positions, which never hold the scores of all
positions against all of V at once: they compute the gradient of each piece of the window before the next is scored.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import ObjectiveConfig
from tokmat_jax.distributed.mesh import batch_shards
from tokmat_jax.method.table import look_up, scores, unit

_AT_ONCE = 1 << 24
"""Maximum number of scores that a device holds at once in training (64 MB)."""
_MASKED = -1e9
"""A logit whose share is exactly 0 in float32, and whose gradient stays finite even if every negative is masked."""


def regression(prediction: jax.Array, target: jax.Array, radius: float) -> jax.Array:
    """L_reg = ‖ẑ − e‖²/R² [...] of `prediction` and `target` [..., d]."""
    return jnp.sum(jnp.square(prediction - target), axis=-1) / radius**2


@struct.dataclass
class Negatives:
    """Tokens from which the targets of a step must be distinguished."""

    ids: jax.Array | None
    """[N], shared by all targets; None for all of V in their order."""
    log_weight: jax.Array
    """Log of the number of times that each counts [N]."""


def all_of(vocab_size: int) -> Negatives:
    """Every token once."""
    return Negatives(None, jnp.zeros((vocab_size,)))


def info_nce(
    prediction: jax.Array, target_ids: jax.Array, table: jax.Array, negatives: Negatives, logit_scale: jax.Array
) -> jax.Array:
    """L_nce [B, T]: −log of the target's share among itself and the negatives, by κ · cosine.

    `prediction` [B, T, d], `target_ids` [B, T], `table` [V, d]. A negative that equals the target is masked out; a
    negative drawn twice counts twice (METHOD §3).
    """
    direction, rows = logit_scale * unit(prediction), unit(table)
    positive = jnp.sum(direction * look_up(rows, target_ids), axis=-1)
    others = _others(direction, target_ids, *_among(rows, negatives))
    return jnp.logaddexp(positive, jax.nn.logsumexp(others, axis=-1)) - positive


def summed_info_nce(
    prediction: jax.Array, target_ids: jax.Array, table: jax.Array, negatives: Negatives, logit_scale: jax.Array,
    weight: jax.Array, dtype: jnp.dtype, radius: float | None = None,
) -> jax.Array:
    """Σ w L_nce [] for `weight` [B, T]; see `info_nce`. Products use `dtype` and accumulate in float32.

    With a `radius`, the rows of a raw table are divided by it and not scaled to norm 1, so that the tokens rank as the
    language model ranks them.
    """
    direction = logit_scale * unit(prediction)
    unit_rows = unit if radius is None else functools.partial(jnp.multiply, 1.0 / radius)
    if negatives.ids is None:
        rows = unit_rows(table)
        return _summed(direction, look_up(rows, target_ids), rows, target_ids, jnp.arange(len(table)),
                       negatives.log_weight, weight, dtype)
    # Only the rows that are needed are scaled to norm 1.
    return _summed(direction, unit_rows(look_up(table, target_ids)), unit_rows(look_up(table, negatives.ids)),
                   target_ids, negatives.ids, negatives.log_weight, weight, dtype)


def _among(rows: jax.Array, negatives: Negatives) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows [N, d], ids [N] and log-weights [N] of the `negatives` among the `rows` [V, d] of the table."""
    if negatives.ids is None:
        return rows, jnp.arange(len(rows)), negatives.log_weight
    return look_up(rows, negatives.ids), negatives.ids, negatives.log_weight


def _others(
    query: jax.Array, target_ids: jax.Array, rows: jax.Array, ids: jax.Array, log_weight: jax.Array
) -> jax.Array:
    """Logits [B, T, N] of the negatives; a negative that equals the target is masked out."""
    logits = scores(query, rows) + log_weight[None, None]
    return jnp.where(ids[None, None, :] == target_ids[..., None], _MASKED, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _summed(
    query: jax.Array, positive: jax.Array, rows: jax.Array, target_ids: jax.Array, ids: jax.Array,
    log_weight: jax.Array, weight: jax.Array, dtype: jnp.dtype,
) -> jax.Array:
    """Σ w · (−log of the target's share) [], from ⟨query, positive⟩ [B, T] among ⟨query, rows⟩ [B, T, N].

    `query` and `positive` are [B, T, d], `rows` [N, d]; no gradient reaches the weights.
    """
    def add(total, piece):
        query, positive, target_ids, weight = piece
        own, everything, *_ = _shares(query, positive, rows, target_ids, ids, log_weight, dtype)
        return total + jnp.sum(weight * (everything - own)), None

    return _over_pieces(add, jnp.float32(0.0), (query, positive, target_ids, weight), len(ids))[0]


def _shares(query, positive, rows, target_ids, ids, log_weight, dtype):
    """The target's logit o and l = log Σ exp over it and the others [B, T]; exp(x − m) of the others' logits x
    [B, T, N], where m is their maximum, and the factor [B, T] that turns it into exp(x − l).
    """
    own = jnp.sum(query * positive, axis=-1)
    others = _others(query.astype(dtype), target_ids, rows.astype(dtype), ids, log_weight)
    largest = jnp.max(others, axis=-1)
    share = jnp.exp(others - largest[..., None])
    everything = jnp.logaddexp(own, largest + jnp.log(jnp.sum(share, axis=-1)))
    return own, everything, share, jnp.exp(largest - everything)


def _summed_with_gradient(query, positive, rows, target_ids, ids, log_weight, weight, dtype):
    def add(carry, piece):
        total, to_rows = carry
        query, positive, target_ids, weight = piece
        own, everything, share, scale = _shares(query, positive, rows, target_ids, ids, log_weight, dtype)
        # The short side of a product is scaled, so that [B, T, N] is written once.
        share, scale = share.astype(dtype), (weight * scale)[..., None]
        lacking = (weight * jnp.expm1(own - everything))[..., None]
        to_query = scale * jnp.einsum("btn,nd->btd", share, rows.astype(dtype), preferred_element_type=jnp.float32)
        to_rows += jnp.einsum("btn,btd->nd", share, (scale * query).astype(dtype),
                              preferred_element_type=jnp.float32)
        total += jnp.sum(weight * (everything - own))
        return (total, to_rows), (to_query + lacking * positive, lacking * query)

    start = (jnp.float32(0.0), jnp.zeros_like(rows))
    (total, to_rows), (to_query, to_positive) = _over_pieces(add, start, (query, positive, target_ids, weight),
                                                             len(ids))
    return total, (to_query, to_positive, to_rows)


def _scaled_gradient(dtype, gradients, cotangent):  # noqa: ARG001
    return *(cotangent * gradient for gradient in gradients), None, None, None, None


_summed.defvjp(_summed_with_gradient, _scaled_gradient)


def _over_pieces(add, carry, arrays, num_rows: int):
    """Scans `add(carry, piece)` over pieces of the windows in `arrays` [B, T, …], each small enough to be scored
    against `num_rows` rows; the outputs of the pieces are joined to whole windows."""
    batch, length = arrays[0].shape[:2]
    largest = max(1, _AT_ONCE * batch_shards() // (batch * num_rows))
    count = -(-length // largest)
    if count == 1:
        return add(carry, arrays)
    size = -(-length // count)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]

    carry, out = jax.lax.scan(add, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)


def draw_negatives(
    key: jax.Array, config: ObjectiveConfig, target_ids: jax.Array, unigram: jax.Array
) -> Negatives:
    """The step's negatives, by `config.negatives` (METHOD §3).

    `target_ids` [B, T] are the targets of the whole batch, `unigram` [V] the share of each token in the
    training split. `full` and `weighted` take all of V and draw nothing. `weighted` counts id j V q_j times,
    q ∝ unigram^β, the average count of j among V negatives drawn from q.
    """
    vocab_size, count = unigram.shape[0], config.num_negatives
    match config.negatives:
        case "full":
            return all_of(vocab_size)
        case "weighted":
            share = _powered(unigram, config.unigram_power)
            return Negatives(None, jnp.maximum(jnp.log(vocab_size * share), _MASKED))
        case "uniform":
            ids = jax.random.randint(key, (count,), 0, vocab_size)
        case "batch":
            flat = target_ids.reshape(-1)
            ids = flat[jax.random.randint(key, (count,), 0, flat.shape[0])]
        case "unigram":
            ids = jax.random.choice(key, vocab_size, (count,), p=_powered(unigram, config.unigram_power))
    return Negatives(ids, jnp.zeros((count,)))


def _powered(unigram: jax.Array, power: float) -> jax.Array:
    """Shares [V] proportional to `unigram`^`power`."""
    weight = unigram**power
    return weight / jnp.sum(weight)


def cross_entropy(
    prediction: jax.Array, target_ids: jax.Array, readout: jax.Array, scale: jax.Array
) -> jax.Array:
    """Next-token cross-entropy [B, T] in nats with logits `scale` · ⟨ẑ, e_i⟩ over the rows of `readout` [V, d]."""
    scaled = scale * prediction
    target = jnp.sum(scaled * look_up(readout, target_ids), axis=-1)
    return jax.nn.logsumexp(scores(scaled, readout), axis=-1) - target


def summed_cross_entropy(
    prediction: jax.Array, target_ids: jax.Array, readout: jax.Array, scale: jax.Array, weight: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Σ w · cross-entropy [] for `weight` [B, T]; see `cross_entropy`. Products use `dtype` and accumulate in
    float32."""
    every = all_of(len(readout))
    return _summed(scale * prediction, look_up(readout, target_ids), readout, target_ids, jnp.arange(len(readout)),
                   every.log_weight, weight, dtype)
