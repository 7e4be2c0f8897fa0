import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from tokmat_jax.config import MaturationConfig, ObjectiveConfig
from tokmat_jax.method import losses, maturation
from tokmat_jax.model.attention import history_mask
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import ar_logit_scale_of, keep_logit_scale_in_range, logit_scale_of, vocabulary_of
from tokmat_jax.training import objective

IDS = jax.random.randint(jax.random.key(7), (4, 48), 0, tiny.VOCAB)
KEYS = objective.row_keys(jax.random.key(8), 4)
NEGATIVES = losses.Negatives(jnp.arange(10), jnp.zeros(10))


def variant(**maturation_fields):
    return dataclasses.replace(tiny.CONFIG, maturation=MaturationConfig(**{"max_tail_length": 16} | maturation_fields))


def recording_forward(config, calls):
    """The real forward that also keeps what it was asked."""
    forward = make_forward(config)

    def record(params, z, maturity, tail_length, positions, mask):
        calls.append((z, maturity, tail_length, mask))
        return forward(params, z, maturity, tail_length, positions, mask)

    return record


def test_the_windows_weigh_a_target_by_its_maturity_and_predict_it_from_before():
    config = variant()
    calls = []
    params = tiny.shaken_params(config)
    windows = objective.run_windows(params, IDS, KEYS, config, recording_forward(config, calls))
    z, maturity, tail_length, mask = calls[0]
    np.testing.assert_array_equal(windows.target_ids, IDS[:, 1:])
    np.testing.assert_array_equal(windows.weight, maturity[:, 1:])
    draw = maturation.draw_tail(KEYS, config.maturation, 16, 1.0)
    np.testing.assert_array_equal(tail_length, draw.tail_length)
    np.testing.assert_array_equal(mask, history_mask(48, 48 - draw.tail_length, draw.history_dropped)[:, -17:])
    table = vocabulary_of(params, config).table
    for row in range(4):
        length = int(tail_length[row])
        for t in range(48):
            alpha = 1.0 if t < 48 - length else 0.9 * (1 - (t - 48 + length) / length)
            noise = draw.noise[row, t - 32] if t >= 32 else 0.0
            np.testing.assert_allclose(z[row, t], alpha * table[IDS[row, t]] + (1 - alpha) * noise, atol=1e-6)


def test_the_loss_is_the_weighted_mean_of_its_terms():
    config = dataclasses.replace(variant(), objective=ObjectiveConfig(nce_weight=0.5, logit_scale=5.0))
    params = tiny.shaken_params(config)
    total, sums = objective.loss_sums(params, IDS, KEYS, NEGATIVES, config, make_forward(config))
    windows = objective.run_windows(params, IDS, KEYS, config, make_forward(config))
    table = windows.vocabulary.table
    mse = losses.regression(windows.prediction, table[windows.target_ids], config.table.radius)
    nce = losses.info_nce(windows.prediction, windows.target_ids, table, NEGATIVES, jnp.float32(5.0))
    np.testing.assert_allclose(total, np.sum(np.asarray(windows.weight) * np.asarray(mse + 0.5 * nce)), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], sums["mse"] + 0.5 * sums["info_nce"], rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], np.sum(windows.weight), rtol=1e-6)


def test_a_later_token_never_reaches_an_earlier_prediction():
    config = variant()
    params = tiny.shaken_params(config)
    forward = make_forward(config)
    before = objective.run_windows(params, IDS, KEYS, config, forward).prediction
    changed = IDS.at[0, 20].set((IDS[0, 20] + 1) % tiny.VOCAB)
    after = objective.run_windows(params, changed, KEYS, config, forward).prediction
    # prediction[:, t − 1] is for position t and sees positions < t.
    np.testing.assert_array_equal(before[0, :20], after[0, :20])
    np.testing.assert_array_equal(before[1:], after[1:])
    assert not np.array_equal(before[0, 20:], after[0, 20:])


def test_dropped_history_hides_what_came_before_the_last_committed_position():
    config = variant(history_dropout=1.0, no_tail_prob=0.0)
    params = tiny.shaken_params(config)
    forward = make_forward(config)
    length = int(maturation.draw_tail(KEYS, config.maturation, 16, 1.0).tail_length[0])
    before = objective.run_windows(params, IDS, KEYS, config, forward).prediction
    last = 48 - length - 1
    after = objective.run_windows(params, IDS.at[0, last - 1].add(1) % tiny.VOCAB, KEYS, config, forward).prediction
    # The output at the last committed position predicts the front: index `last` of the shifted predictions.
    np.testing.assert_allclose(before[0, last:], after[0, last:], atol=1e-6)
    assert np.abs(before[0, last - 1] - after[0, last - 1]).max() > 1e-3


def test_a_self_conditioned_tail_holds_predictions_and_never_the_truth():
    config = variant(self_condition_prob=1.0, no_tail_prob=0.0, history_dropout=0.0)
    params, calls = tiny.shaken_params(config), []
    forward = recording_forward(config, calls)
    objective.run_windows(params, IDS, KEYS, config, forward)
    (first, maturity, tail_length, _), (second, *_) = calls
    draw = maturation.draw_tail(KEYS, config.maturation, 16, 1.0)
    own = make_forward(config)(params["backbone"], first, maturity, tail_length,
                               jnp.broadcast_to(jnp.arange(48)[None], (4, 48)))[0]
    table = vocabulary_of(params, config).table
    for row in range(4):
        start = 48 - int(tail_length[row])
        np.testing.assert_array_equal(first[row, start:], draw.noise[row, start - 32 :])
        np.testing.assert_array_equal(second[row, :start], table[IDS[row, :start]])
        alpha = maturity[row, start:, None]
        want = alpha * own[row, start - 1 : 47] + (1 - alpha) * draw.noise[row, start - 32 :]
        np.testing.assert_allclose(second[row, start:], want, atol=1e-5)


def test_self_conditioning_stops_the_gradient_of_the_first_pass():
    config = variant(self_condition_prob=1.0, no_tail_prob=0.0)
    params = tiny.shaken_params(config)
    calls = []

    def loss(own_params):
        # The second pass has fixed parameters: whatever gradient is left would have come through the first.
        def forward(_, *args, **kwargs):
            calls.append(None)
            chosen = own_params if len(calls) == 1 else params["backbone"]
            return make_forward(config)(chosen, *args, **kwargs)

        return jnp.sum(objective.run_windows(params, IDS, KEYS, config, forward).prediction)

    gradient = jax.grad(loss)(params["backbone"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_baseline_reads_clean_vectors_without_a_tail():
    config = dataclasses.replace(tiny.CONFIG, objective=ObjectiveConfig(kind="ar"))
    params, calls = tiny.shaken_params(config), []
    windows = objective.run_windows(params, IDS, KEYS, config, recording_forward(config, calls))
    z, maturity, tail_length, mask = calls[0]
    np.testing.assert_array_equal(z, vocabulary_of(params, config).table[IDS])
    assert np.all(np.asarray(maturity) == 1.0)
    assert not np.any(tail_length)
    assert mask is None
    sums = objective.weighted_sums(windows, params, NEGATIVES, config)
    assert set(sums) == {"loss", "cross_entropy", "weight"}
    own = losses.cross_entropy(windows.prediction, windows.target_ids, windows.vocabulary.readout,
                               ar_logit_scale_of(params, config))
    np.testing.assert_allclose(sums["loss"], np.sum(own), rtol=1e-5)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_table_gets_no_gradient(trainable):
    config = dataclasses.replace(tiny.CONFIG, table=dataclasses.replace(tiny.CONFIG.table, trainable=trainable))
    params = tiny.shaken_params(config)

    def loss(params):
        return objective.loss_sums(params, IDS, KEYS, NEGATIVES, config, make_forward(config))[0]

    gradient = jax.grad(loss)(params)["table"]
    assert np.any(gradient) == trainable


def test_a_learned_logit_scale_moves_and_stays_in_range():
    config = dataclasses.replace(tiny.CONFIG, objective=ObjectiveConfig(logit_scale=10.0, learn_logit_scale=True))
    params = tiny.shaken_params(config)
    params["log_logit_scale"] = jnp.log(jnp.float32(10.0))
    np.testing.assert_allclose(logit_scale_of(params, config), 10.0, rtol=1e-6)

    def loss(params):
        return objective.loss_sums(params, IDS, KEYS, NEGATIVES, config, make_forward(config))[0]

    assert float(jax.grad(loss)(params)["log_logit_scale"]) != 0.0
    for far, edge in ((99.0, 100.0), (-99.0, 1.0)):
        params["log_logit_scale"] = jnp.float32(far)
        back = keep_logit_scale_in_range(params)
        np.testing.assert_allclose(logit_scale_of(back, config), edge, rtol=1e-5)
