"""From a batch of ids to the loss: vectors → simulated tail → model → weighted loss (METHOD §3).

All results are weighted sums over positions, so that micro-batches, devices and validation batches add up to exactly
the result of one large batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import Config
from tokmat_jax.method import losses, maturation
from tokmat_jax.method.many_tails import draw_tails, earlier_slots, embryo_slots, matured_slots, slot_maturity
from tokmat_jax.method.table import Vocabulary, look_up, read
from tokmat_jax.model.attention import history_mask
from tokmat_jax.model.backbone import Forward, Params
from tokmat_jax.model.lora import dropout_keys
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
    positions = _positions(ids)

    dropout = _dropout(keys, config)

    def predict(z, maturity, tail_length, mask):
        return forward(params["backbone"], z, maturity, tail_length, positions, mask, **dropout)[0]

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


def run_with_tails(
    params: Params, ids: jax.Array, keys: jax.Array, config: Config, forward: Forward
) -> tuple[PredictedWindows, PredictedWindows]:
    """Predicts every position of `ids` [B, T] from clean vectors, told K = 0, and the positions from the anchors of M
    tails on. Returns the windows, and the tails as windows of M K targets [B, M K], whose weights are 1, or 0 for a
    front that the window predicts already.

    The keys of the window are computed once. A self-conditioned tail runs twice over them: first with embryos, from an
    earlier anchor, then with the vectors that this predicted (`method/many_tails.py`).
    """
    tokens, settings = vocabulary_of(params, config), config.maturation
    batch, length = ids.shape
    backbone, table, count = params["backbone"], tokens.table, settings.max_tail_length
    in_front = config.objective.kind == "tail"
    if in_front:
        settings = dataclasses.replace(settings, history_dropout=0.0)
    draw = draw_tails(keys, settings, length, config.model.embed_dim, config.table.radius)
    # The window of a language model that stays as it is needs no backward pass.
    reader = jax.lax.stop_gradient(backbone) if in_front else backbone
    prediction, history = forward(reader, look_up(table, ids), jnp.ones(ids.shape), jnp.zeros((batch,), jnp.int32),
                                  _positions(ids), **_dropout(keys, config))
    alpha = slot_maturity(settings)
    maturity = jnp.concatenate([jnp.ones((1,)), alpha])
    index = jnp.arange(count)[None, None, :]
    told = jnp.where(index[0] == 0, 0, count)

    def rows(x):
        """[B, M, …] → [B M, …]: a tail is a row of its own, which shares the history of its window."""
        return x.reshape(-1, *x.shape[2:])

    of_tails = rows(jax.vmap(lambda key: row_keys(key, settings.num_tails))(keys))

    def run(anchor, slots):
        newest = look_up(table, jnp.take_along_axis(ids, anchor - 1, axis=1))[:, :, None]
        where = rows(anchor[:, :, None] - 1 + index)
        num_visible = jnp.where(draw.history_dropped, 0, anchor - 1)
        ahead, _ = forward(backbone, rows(jnp.concatenate([newest, slots], axis=2)),
                           jnp.broadcast_to(maturity[None, :], where.shape), jnp.broadcast_to(told, where.shape), where,
                           history=history, num_visible=rows(num_visible), **_dropout(of_tails, config))
        return ahead.reshape(batch, -1, count, ahead.shape[-1])

    slots = embryo_slots(draw, count - 1)
    if settings.self_condition_prob > 0:
        own = run(draw.anchor - draw.moved, earlier_slots(draw, count - 1))
        slots = matured_slots(draw, jax.lax.stop_gradient(own), alpha)
    ahead = run(draw.anchor, slots)
    place = (draw.anchor[:, :, None] + index).reshape(batch, -1)
    said = ids
    if settings.tails_target == "model":
        own_choice, _ = read(jax.lax.stop_gradient(prediction), tokens, 1.0)
        said = jnp.concatenate([ids[:, :1], own_choice[:, :-1]], axis=1)
    front = (index == 0) & ~draw.history_dropped[:, :, None]
    weight = 1.0 - front.astype(jnp.float32)
    windows = PredictedWindows(tokens, ids[:, 1:], jnp.ones((batch, length - 1)), prediction[:, :-1])
    tails = PredictedWindows(tokens, jnp.take_along_axis(said, place, axis=1), weight.reshape(batch, -1),
                             ahead.reshape(batch, -1, ahead.shape[-1]))
    return windows, tails


def _dropout(keys: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The argument of the forward by which an adapter drops inputs, with one of `keys` [B] per row; none if it does
    not."""
    found = dropout_keys(keys, config)
    return {} if found is None else {"dropout": found}


def _positions(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)


def weighted_sums(
    windows: PredictedWindows, params: Params, negatives: losses.Negatives, config: Config
) -> dict[str, jax.Array]:
    """Weighted sum Σ w_t L_t [] of each loss term by name, and `weight` = Σ w_t; training minimises `loss`."""
    dtype, total = jnp.dtype(config.model.dtype), jnp.sum(windows.weight)
    if config.objective.kind == "ar":
        entropy = losses.summed_cross_entropy(windows.prediction, windows.target_ids, windows.vocabulary.readout,
                                              ar_logit_scale_of(params, config), windows.weight, dtype)
        return {"loss": entropy, "cross_entropy": entropy, "weight": total}
    if config.objective.kind == "tail":
        return _slot_sums(windows, negatives, config)
    table = windows.vocabulary.table
    mse = jnp.sum(windows.weight * losses.regression(windows.prediction, look_up(table, windows.target_ids),
                                                     config.table.radius))
    nce = losses.summed_info_nce(windows.prediction, windows.target_ids, table, negatives,
                                 logit_scale_of(params, config), windows.weight, dtype)
    return {"loss": mse + config.objective.nce_weight * nce, "mse": mse, "info_nce": nce, "weight": total}


def _slot_sums(windows: PredictedWindows, negatives: losses.Negatives, config: Config) -> dict[str, jax.Array]:
    """`weighted_sums` for the slots in front of a language model: their vectors are those of its output rows, which may
    have norms of their own."""
    rows, radius = windows.vocabulary.readout, config.table.radius
    mse = jnp.sum(windows.weight * losses.regression(windows.prediction, look_up(rows, windows.target_ids), radius))
    nce = losses.summed_info_nce(windows.prediction, windows.target_ids, rows, negatives,
                                 jnp.float32(config.objective.slot_logit_scale), windows.weight,
                                 jnp.dtype(config.model.dtype), radius)
    return {"loss": mse + config.objective.nce_weight * nce, "mse": mse, "info_nce": nce,
            "weight": jnp.sum(windows.weight)}


def sums_with_tails(
    windows: PredictedWindows, tails: PredictedWindows, params: Params, negatives: losses.Negatives, config: Config
) -> dict[str, jax.Array]:
    """As `weighted_sums` of `windows`, with the sums of `tails` beside them (`tails_…`), scaled so that both are
    divided by `weight`: the loss is the mean over clean positions plus μ times the mean over slots."""
    sums = weighted_sums(windows, params, negatives, config)
    # A constant number of slots, so that micro-batches and devices add up.
    slots = tails.weight.size * (1.0 - 1.0 / config.maturation.max_tail_length)
    scale = windows.weight.size / slots
    of_tails = weighted_sums(tails, params, negatives, config)
    own = {f"tails_{name}": scale * of_tails[name] for name in ("loss", "mse", "info_nce")}
    return sums | own | {"loss": sums["loss"] + config.maturation.tails_weight * own["tails_loss"]}


def loss_sums(
    params: Params, ids: jax.Array, keys: jax.Array, negatives: losses.Negatives, config: Config, forward: Forward
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ w_t L_t, and the sums of each term with `weight` = Σ w_t; a mean is a sum divided by `weight`."""
    if config.objective.kind == "tail":
        sums = weighted_sums(run_with_tails(params, ids, keys, config, forward)[1], params, negatives, config)
    elif config.objective.kind == "maturation" and config.maturation.num_tails > 0:
        sums = sums_with_tails(*run_with_tails(params, ids, keys, config, forward), params, negatives, config)
    else:
        windows = run_windows(params, ids, keys, config, forward)
        sums = weighted_sums(windows, params, negatives, config)
    return sums["loss"], sums
