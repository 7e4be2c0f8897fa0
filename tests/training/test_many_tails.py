"""Many tails per window: what they hold, what they see, what they cost the window, and how they are weighed."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from tokmat_jax.config import DataConfig, MaturationConfig
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.passes import reference_of
from tokmat_jax.generation.generator import Generator, settings_of
from tokmat_jax.hf.convert import export_weights, import_weights
from tokmat_jax.method import losses
from tokmat_jax.method.many_tails import draw_tails, embryo_slots, matured_slots, slot_maturity
from tokmat_jax.model.attention import LayerCache, attend
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import vocabulary_of
from tokmat_jax.training import objective
from tokmat_jax.training.step import eval_sums

K, M, T = 6, 3, 48
IDS = jax.random.randint(jax.random.key(7), (4, T), 0, tiny.VOCAB)
KEYS = objective.row_keys(jax.random.key(8), 4)
NEGATIVES = losses.all_of(tiny.VOCAB)


def variant(**fields):
    settings = {"max_tail_length": K, "num_tails": M, "self_condition_prob": 0.7, "history_dropout": 0.3}
    return dataclasses.replace(tiny.CONFIG, maturation=MaturationConfig(**settings | fields))


CONFIG = variant()
PARAMS = tiny.shaken_params(CONFIG)
DRAW = draw_tails(KEYS, CONFIG.maturation, T, 16, 1.0)


@functools.cache
def run(config=CONFIG):
    """The jitted `run_with_tails` of `config`."""
    return jax.jit(lambda params, ids: objective.run_with_tails(params, ids, KEYS, config, make_forward(config)))


def of_tails(tails):
    """Predictions [B, M, K, d]."""
    return np.asarray(tails.prediction).reshape(4, M, K, -1)


def test_tails_lie_within_their_window_and_depend_on_their_rows_key_alone():
    many = draw_tails(objective.row_keys(jax.random.key(0), 200), CONFIG.maturation, T, 16, 1.0)
    first, last = many.anchor - many.moved - 1, many.anchor + K - 1
    assert int(first.min()) == 0
    assert int(last.max()) == T - 1
    assert set(np.unique(many.moved)) == {1, 2}
    other = draw_tails(KEYS[::-1], CONFIG.maturation, T, 16, 1.0)
    np.testing.assert_array_equal(other.noise[::-1], DRAW.noise)
    np.testing.assert_array_equal(other.anchor[::-1], DRAW.anchor)


def test_slots_hold_own_vectors_moved_up_or_embryos():
    own, alpha = jax.random.normal(jax.random.key(1), (4, M, K, 16)), slot_maturity(CONFIG.maturation)
    np.testing.assert_allclose(alpha, [0.9 * (1 - j / K) for j in range(K - 1)], rtol=1e-6)
    slots = matured_slots(DRAW, own, alpha)
    for row in range(4):
        for tail in range(M):
            moved = int(DRAW.moved[row, tail])
            for slot in range(K - 1):
                noise = DRAW.noise[row, tail, slot + moved]
                known = bool(DRAW.self_conditioned[row, tail]) and slot + moved < K
                want = alpha[slot] * own[row, tail, slot + moved] + (1 - alpha[slot]) * noise if known else noise
                np.testing.assert_allclose(slots[row, tail, slot], want, atol=1e-6)
    np.testing.assert_array_equal(embryo_slots(DRAW, K)[0, 0], DRAW.noise[0, 0, int(DRAW.moved[0, 0]) :][:K])


def test_a_tail_predicts_what_the_whole_sequence_run_at_once_predicts():
    """The oracle: committed vectors and slots in one causal sequence, without a shared history."""
    config = variant(self_condition_prob=0.0, history_dropout=0.0)
    windows, tails = run(config)(PARAMS, IDS)
    draw, table = draw_tails(KEYS, config.maturation, T, 16, 1.0), vocabulary_of(PARAMS, config).table
    forward = tiny.padded_forward(config)
    for row, tail in ((0, 0), (1, 2), (3, 1)):
        anchor = int(draw.anchor[row, tail])
        slots = draw.noise[row, tail, int(draw.moved[row, tail]) :][: K - 1]
        z = np.concatenate([table[IDS[row, :anchor]], slots])[None]
        length = z.shape[1]
        maturity = np.concatenate([np.ones(anchor), slot_maturity(config.maturation)])[None].astype(np.float32)
        told = np.where(np.arange(length) < anchor, 0, K)[None].astype(np.int32)
        mask = np.tril(np.ones((1, length, length), bool))
        whole, _ = forward(PARAMS["backbone"], z, maturity, told, np.arange(length)[None], mask)
        np.testing.assert_allclose(of_tails(tails)[row, tail], whole[0, anchor - 1 :], atol=1e-5)
        np.testing.assert_allclose(windows.prediction[row, anchor - 1], whole[0, anchor - 1], atol=1e-5)


def test_a_front_is_the_windows_own_prediction_unless_the_history_is_dropped():
    windows, tails = run()(PARAMS, IDS)
    front = np.take_along_axis(np.asarray(windows.prediction), np.asarray(DRAW.anchor - 1)[..., None], axis=1)
    far = np.abs(of_tails(tails)[:, :, 0] - front).max(-1)
    dropped = np.asarray(DRAW.history_dropped)
    assert dropped.any()
    assert not dropped.all()
    assert far[~dropped].max() < 1e-5
    assert far[dropped].min() > 1e-2
    weight = np.asarray(tails.weight).reshape(4, M, K)
    np.testing.assert_array_equal(weight[:, :, 0], dropped)
    assert np.all(weight[:, :, 1:] == 1)
    target = np.asarray(tails.target_ids).reshape(4, M, K)
    np.testing.assert_array_equal(target[2, 1], IDS[2, int(DRAW.anchor[2, 1]) :][:K])


def test_a_tail_sees_the_text_before_its_anchor_and_nothing_else():
    before = of_tails(run()(PARAMS, IDS)[1])
    for row in range(4):
        for position in (5, 20, 35):
            changed = IDS.at[row, position].set((IDS[row, position] + 1) % tiny.VOCAB)
            after = of_tails(run()(PARAMS, changed)[1])
            moved = np.abs(after - before).max((2, 3))
            np.testing.assert_array_equal(np.delete(moved, row, axis=0), 0)
            anchor, dropped = np.asarray(DRAW.anchor[row]), np.asarray(DRAW.history_dropped[row])
            np.testing.assert_array_equal(moved[row][anchor <= position], 0)
            assert np.all(moved[row][(anchor > position) & ~dropped] > 1e-4)
            own_copy = np.isin(position, [anchor - 1, anchor - np.asarray(DRAW.moved[row]) - 1])
            np.testing.assert_array_equal(moved[row][dropped & (anchor - 4 > position) & ~own_copy], 0)


def test_the_window_never_reads_a_tail():
    windows, _ = run()(PARAMS, IDS)
    table = vocabulary_of(PARAMS, CONFIG).table
    plain, _ = make_forward(CONFIG)(PARAMS["backbone"], table[IDS], jnp.ones((4, T)), jnp.zeros((4,), jnp.int32),
                                    jnp.broadcast_to(jnp.arange(T)[None], (4, T)))
    np.testing.assert_allclose(windows.prediction, plain[:, :-1], atol=1e-6)


def test_the_loss_is_the_mean_of_the_window_plus_mu_times_that_of_the_slots():
    config = variant(tails_weight=0.25, history_dropout=0.0)

    def sums(ids, keys):
        return objective.loss_sums(PARAMS, ids, keys, NEGATIVES, config, make_forward(config))[1]

    whole = sums(IDS, KEYS)
    windows, tails = objective.run_with_tails(PARAMS, IDS, KEYS, config, make_forward(config))
    clean, slots = (objective.weighted_sums(part, PARAMS, NEGATIVES, config) for part in (windows, tails))
    want = clean["loss"] / (4 * (T - 1)) + 0.25 * slots["loss"] / (4 * M * (K - 1))
    np.testing.assert_allclose(whole["loss"] / whole["weight"], want, rtol=1e-5)
    np.testing.assert_allclose(whole["tails_loss"] / whole["weight"], slots["loss"] / slots["weight"], rtol=1e-5)
    halves = [sums(IDS[rows], KEYS[rows]) for rows in (slice(0, 2), slice(2, 4))]
    for name, total in whole.items():
        np.testing.assert_allclose(sum(half[name] for half in halves), total, rtol=1e-5)


def test_own_vectors_pass_no_gradient_and_slots_do():
    config = variant(self_condition_prob=1.0, history_dropout=0.0)

    def gradient(earlier):
        """Of the slots' predictions, by parameters that the pass at the `earlier` anchors alone has, or never has."""
        calls = []

        def loss(own):
            def forward(params, *args, **kwargs):
                calls.append(None)
                return make_forward(config)(own if (len(calls) == 2) == earlier else params, *args, **kwargs)

            return jnp.sum(objective.run_with_tails(PARAMS, IDS, KEYS, config, forward)[1].prediction)

        found = jax.grad(loss)(PARAMS["backbone"])
        assert len(calls) == 3  # the window once, the tails twice over its keys
        return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found))

    assert gradient(earlier=True) == 0.0
    assert gradient(earlier=False) > 0.0


def test_the_targets_may_be_what_the_model_says_itself():
    config = variant(tails_target="model")
    windows, tails = run(config)(PARAMS, IDS)
    table = np.asarray(vocabulary_of(PARAMS, config).table)
    said = np.argmax(np.asarray(windows.prediction) @ table.T, axis=-1)  # [B, T − 1], index t − 1 for position t
    target = np.asarray(tails.target_ids).reshape(4, M, K)
    for row in range(4):
        anchor = int(DRAW.anchor[row, 1])
        np.testing.assert_array_equal(target[row, 1], said[row, anchor - 1 :][:K])


def test_validation_tells_the_slots_apart_and_generation_is_told_what_training_was():
    with jax.numpy_dtype_promotion("standard"):
        sums = eval_sums(PARAMS, IDS, jnp.ones(tiny.VOCAB) / tiny.VOCAB, jnp.int32(0), CONFIG)
    assert {name for name in sums if "slot" in name} == {
        f"{kind}/slot_{slot}" for kind in ("top1", "count") for slot in range(1, K)}
    assert {float(value) for name, value in sums.items() if name.startswith("count/slot")} == {4.0 * M}
    assert float(sums["count/maturity_1"]) == 4 * (T - 1)
    assert settings_of(CONFIG).model_tail_length == 0
    assert settings_of(variant(num_tails=0)).model_tail_length is None


def test_a_run_with_many_tails_generates_as_it_was_trained_and_is_exported_so(runs_dir, tmp_path):
    flags = runs.arguments(runs_dir, "tails", "--workdir", str(tmp_path / "run"), "--maturation.num-tails", "3",
                           "--maturation.max-tail-length", "4", "--maturation.self-condition-prob", "0.7")
    runs.go(*flags)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {f"validation/top1/slot_{slot}" for slot in (1, 2, 3)} <= rows[-1].keys() | rows[-2].keys()
    assert any("train/tails_mse" in row for row in rows)
    run = Generator.from_workdir(tmp_path / "run")
    prompts, settings = [[5, 6, 7], [9, 8]], dataclasses.replace(run.settings, max_new_tokens=20)
    checked = run.generate(prompts, dataclasses.replace(settings, commit="verified"))
    assert [one.tokens for one in checked] == [one.tokens for one in run.generate(prompts, reference_of(settings))]
    export_weights(tmp_path / "run", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf" / "maturation")
    import_weights(str(tmp_path / "hf"), tmp_path / "plain")
    ids = list(range(3, 30))
    assert Generator.from_workdir(tmp_path / "plain").next_tokens(ids) == run.next_tokens(ids)


def test_rows_may_share_a_history():
    query, key, value = jax.random.normal(jax.random.key(2), (3, 6, 2, 3, 8))
    history = LayerCache(*jax.random.normal(jax.random.key(3), (2, 3, 2, 5, 8)))
    num_visible = jnp.array([0, 5, 2, 1, 3, 4])
    shared = attend(query, LayerCache(key, value), None, history, num_visible)
    copied = attend(query, LayerCache(key, value), None, jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), history),
                    num_visible)
    np.testing.assert_allclose(shared, copied, atol=1e-6)


@pytest.mark.parametrize(("fields", "said"), [
    ({"max_tail_length": 1}, "maturation.num_tails needs a maturation.max_tail_length .K_max. of at least 2"),
    ({"max_tail_length": 46}, "a tail of 46 slots does not fit into a window of data.seq_len 48"),
])
def test_tails_that_cannot_be_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        variant(**fields)


def test_the_largest_tail_that_is_taken_has_a_place():
    config = dataclasses.replace(variant(max_tail_length=45), data=DataConfig(seq_len=48))
    assert np.all(np.asarray(draw_tails(KEYS, config.maturation, 48, 16, 1.0).anchor) == 3)
