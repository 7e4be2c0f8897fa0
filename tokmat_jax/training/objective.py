"""From a batch of ids to the loss: vectors → simulated tail → model → weighted loss (METHOD §3).

All results are weighted sums over positions, so that micro-batches, devices and validation batches add up to exactly
the result of one large batch.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import Config
from tokmat_jax.method import losses, maturation
from tokmat_jax.method.table import Vocabulary, look_up
from tokmat_jax.model.attention import history_mask
from tokmat_jax.model.backbone import Forward, Params
from tokmat_jax.model.params import ar_logit_scale_of, logit_scale_of, vocabulary_of


@struct.dataclass
class PredictedWindows:
    """The targets of a batch and the model's predictions for them."""

    vocabulary: Vocabulary
    """E, and the rows to which predictions are compared."""
    target_ids: jax.Array
    """x_2..x_T [B, T−1]."""
    weight: jax.Array
    """w_t = α_t [B, T−1], the maturity of the target position."""
    prediction: jax.Array
    """ẑ_2..ẑ_T [B, T−1, d]; each computed from earlier positions."""


def row_keys(step_key: jax.Array, batch_size: int) -> jax.Array:
    """One key per row [B] of the batch of a step, independent of micro-batches and devices."""
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(batch_size))


def run_windows(params: Params, ids: jax.Array, keys: jax.Array, config: Config, forward: Forward) -> PredictedWindows:
    """Builds the vectors of `ids` [B, T] with one of `keys` [B] per row and predicts every position.

    The baseline (`objective.kind = "ar"`) reads clean vectors, with maturity 1 and K = 0. A self-conditioned row
    is predicted twice: first with embryos for a tail, as the decoder starts, then with those predictions in
    place of the true vectors.
    """
    tokens = vocabulary_of(params, config)
    clean = look_up(tokens.table, ids)
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))

    def predict(z, maturity, tail_length, mask):
        return forward(params["backbone"], z, maturity, tail_length, positions, mask)[0]

    if config.objective.kind == "ar":
        maturity = jnp.ones((batch, length))
        output = predict(clean, maturity, jnp.zeros((batch,), jnp.int32), None)
    else:
        settings = config.maturation
        draw = maturation.draw_tail(keys, settings, config.model.embed_dim, config.table.radius)
        maturity = maturation.window_maturity(draw.tail_length, length, settings.profile, settings.max_maturity)
        mask = None
        if settings.history_dropout > 0:
            # For every K, the last committed position is among the last K_max + 1.
            mask = history_mask(length, length - draw.tail_length, draw.history_dropped,
                                settings.max_tail_length + 1)
        history = jnp.arange(length)[None, :] < (length - draw.tail_length)[:, None]
        content = clean
        if settings.self_condition_prob > 0:
            embryos = maturation.mix_tail(clean, draw.noise, history.astype(clean.dtype))
            first = jax.lax.stop_gradient(predict(embryos, maturity, draw.tail_length, mask))
            own = jnp.concatenate([clean[:, :1], first[:, :-1]], axis=1)
            content = jnp.where((draw.self_conditioned[:, None] & ~history)[..., None], own, clean)
        z = maturation.mix_tail(content, draw.noise, maturity)
        output = predict(z, maturity, draw.tail_length, mask)
    return PredictedWindows(tokens, ids[:, 1:], maturity[:, 1:], output[:, :-1])


def weighted_sums(
    windows: PredictedWindows, params: Params, negatives: losses.Negatives, config: Config
) -> dict[str, jax.Array]:
    """Weighted sum Σ w_t L_t [] of each loss term by name, and `weight` = Σ w_t; training minimises `loss`."""
    dtype, total = jnp.dtype(config.model.dtype), jnp.sum(windows.weight)
    if config.objective.kind == "ar":
        entropy = losses.summed_cross_entropy(windows.prediction, windows.target_ids, windows.vocabulary.readout,
                                              ar_logit_scale_of(params, config), windows.weight, dtype)
        return {"loss": entropy, "cross_entropy": entropy, "weight": total}
    table = windows.vocabulary.table
    mse = jnp.sum(windows.weight * losses.regression(windows.prediction, look_up(table, windows.target_ids),
                                                     config.table.radius))
    nce = losses.summed_info_nce(windows.prediction, windows.target_ids, table, negatives,
                                 logit_scale_of(params, config), windows.weight, dtype)
    return {"loss": mse + config.objective.nce_weight * nce, "mse": mse, "info_nce": nce, "weight": total}


def loss_sums(
    params: Params, ids: jax.Array, keys: jax.Array, negatives: losses.Negatives, config: Config, forward: Forward
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ w_t L_t, and the sums of each term with `weight` = Σ w_t; a mean is a sum divided by `weight`."""
    windows = run_windows(params, ids, keys, config, forward)
    sums = weighted_sums(windows, params, negatives, config)
    return sums["loss"], sums
