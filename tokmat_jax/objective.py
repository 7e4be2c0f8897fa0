"""From a batch of ids to the loss: vectors → simulated tail → model → weighted loss (METHOD §3).

Everything is returned as sums over positions with the weight they carry, so that micro-batches, devices and
validation batches add up to exactly what one large batch gives.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax import guidance, losses, maturation
from tokmat_jax import table as sphere_table
from tokmat_jax.config import Config
from tokmat_jax.model import Forward, Params


@struct.dataclass
class Windows:
    """A batch as the model meets it, and what it answers."""

    table: jax.Array
    """E [V, d]."""
    target_ids: jax.Array
    """x_2..x_T [B, T−1]."""
    weight: jax.Array
    """w_t = α_t [B, T−1], maturity of the target position."""
    prediction: jax.Array
    """ẑ_2..ẑ_T [B, T−1, d]; each computed from earlier positions."""


def row_keys(step_key: jax.Array, batch_size: int) -> jax.Array:
    """One key per row [B] of the batch of a step, whatever the micro-batches and devices."""
    return jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(batch_size))


def logit_scale(params: Params, config: Config) -> jax.Array:
    """κ [], fixed or learned."""
    if not config.objective.learn_logit_scale:
        return jnp.float32(config.objective.logit_scale)
    return jnp.exp(params["log_logit_scale"])


def keep_logit_scale_in_range(params: Params) -> Params:
    """`params` with a learned κ back within 1..100; after the update, so that its gradient never vanishes."""
    if "log_logit_scale" not in params:
        return params
    return params | {"log_logit_scale": jnp.clip(params["log_logit_scale"], 0.0, math.log(100.0))}


def vocabulary(params: Params, config: Config) -> jax.Array:
    """E [V, d]; a frozen table passes no gradient."""
    table = sphere_table.sphere(params["table"], config.table.radius)
    return table if config.table.trainable else jax.lax.stop_gradient(table)


def run_windows(params: Params, ids: jax.Array, keys: jax.Array, config: Config, forward: Forward) -> Windows:
    """Builds the vectors of `ids` [B, T] with one of `keys` [B] per row and predicts every position.

    The baseline (`objective.kind = "ar"`) reads clean vectors, with maturity 1 and K = 0. A self-conditioned row
    is predicted twice: first with embryos for a tail, as the decoder starts, then with those predictions in
    the truth's place.
    """
    table = vocabulary(params, config)
    clean = sphere_table.look_up(table, ids)
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
            mask = guidance.history_mask(length, length - draw.tail_length, draw.history_dropped)
        history = jnp.arange(length)[None, :] < (length - draw.tail_length)[:, None]
        content = clean
        if settings.self_condition_prob > 0:
            embryos = maturation.mix_tail(clean, draw.noise, history.astype(clean.dtype))
            first = jax.lax.stop_gradient(predict(embryos, maturity, draw.tail_length, mask))
            own = jnp.concatenate([clean[:, :1], first[:, :-1]], axis=1)
            content = jnp.where((draw.self_conditioned[:, None] & ~history)[..., None], own, clean)
        z = maturation.mix_tail(content, draw.noise, maturity)
        output = predict(z, maturity, draw.tail_length, mask)
    return Windows(table, ids[:, 1:], maturity[:, 1:], output[:, :-1])


def position_losses(windows: Windows, params: Params, negatives: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Loss terms [B, T−1] by name; `loss` is what training minimises."""
    radius, scale = config.table.radius, logit_scale(params, config)
    if config.objective.kind == "ar":
        entropy = losses.cross_entropy(windows.prediction, windows.target_ids, windows.table, radius, scale)
        return {"loss": entropy, "cross_entropy": entropy}
    target = sphere_table.look_up(windows.table, windows.target_ids)
    mse = losses.regression(windows.prediction, target, radius)
    nce = losses.info_nce(windows.prediction, windows.target_ids, windows.table, negatives, scale)
    return {"loss": mse + config.objective.nce_weight * nce, "mse": mse, "info_nce": nce}


def loss_sums(
    params: Params, ids: jax.Array, keys: jax.Array, negatives: jax.Array, config: Config, forward: Forward
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ w_t L_t, and the sums of each term with `weight` = Σ w_t; a mean is a sum divided by `weight`."""
    windows = run_windows(params, ids, keys, config, forward)
    terms = position_losses(windows, params, negatives, config)
    sums = {name: jnp.sum(windows.weight * term) for name, term in terms.items()}
    return sums["loss"], sums | {"weight": jnp.sum(windows.weight)}
