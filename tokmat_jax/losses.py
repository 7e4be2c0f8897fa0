"""Losses per position: MSE on the sphere, InfoNCE with its negatives, the baseline's cross-entropy (METHOD §3)."""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import ObjectiveConfig
from tokmat_jax.table import look_up, scores, unit

_MASKED = -1e9
"""A logit whose share is exactly 0 in float32, and whose gradient stays finite where every negative is masked."""


def regression(prediction: jax.Array, target: jax.Array, radius: float) -> jax.Array:
    """L_reg = ‖ẑ − e‖²/R² [...] of `prediction` and `target` [..., d]."""
    return jnp.sum(jnp.square(prediction - target), axis=-1) / radius**2


@struct.dataclass
class Negatives:
    """What the targets of a step are told apart from."""

    ids: jax.Array
    """[N], shared by all targets."""
    log_weight: jax.Array
    """log of how many times each counts [N]."""


def all_of(vocab_size: int) -> Negatives:
    """Every token once."""
    return Negatives(jnp.arange(vocab_size), jnp.zeros((vocab_size,)))


def info_nce(
    prediction: jax.Array, target_ids: jax.Array, table: jax.Array, negatives: Negatives, logit_scale: jax.Array
) -> jax.Array:
    """L_nce [B, T]: −log of the target's share among itself and the negatives, by κ · cosine.

    `prediction` [B, T, d], `target_ids` [B, T], `table` [V, d]. A negative that equals the target is masked out; a
    negative drawn twice counts twice (METHOD §3).
    """
    # κ scales the short side of the product, and nothing is concatenated: [B, T, N] is written once.
    direction = logit_scale * unit(prediction)
    positive = jnp.sum(direction * unit(look_up(table, target_ids)), axis=-1)
    others = scores(direction, unit(look_up(table, negatives.ids))) + negatives.log_weight[None, None]
    others = jnp.where(negatives.ids[None, None, :] == target_ids[..., None], _MASKED, others)
    return jnp.logaddexp(positive, jax.nn.logsumexp(others, axis=-1)) - positive


def draw_negatives(
    key: jax.Array, config: ObjectiveConfig, target_ids: jax.Array, unigram: jax.Array
) -> Negatives:
    """The step's negatives, by `config.negatives` (METHOD §3).

    `target_ids` [B, T] are the targets of the whole batch, `unigram` [V] the share of each token in the
    training split. `full` and `weighted` return all V ids and draw nothing; `weighted` lets id j count V q_j times,
    q ∝ unigram^β, which is what V negatives drawn from q come to on average.
    """
    vocab_size, count = unigram.shape[0], config.num_negatives
    match config.negatives:
        case "full":
            return all_of(vocab_size)
        case "weighted":
            share = _powered(unigram, config.unigram_power)
            return Negatives(jnp.arange(vocab_size), jnp.maximum(jnp.log(vocab_size * share), _MASKED))
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
    # The target's logit is computed again: picking it out of [B, T, V] costs a scatter in the backward pass.
    target = jnp.sum(scaled * look_up(readout, target_ids), axis=-1)
    return jax.nn.logsumexp(scores(scaled, readout), axis=-1) - target
