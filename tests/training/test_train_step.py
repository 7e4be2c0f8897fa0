import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from tokmat_jax.config import ComputeConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from tokmat_jax.distributed import mesh as sharding
from tokmat_jax.model.params import init_params, vocabulary_of
from tokmat_jax.training.optim import make_optimizer, make_schedule
from tokmat_jax.training.step import eval_means, eval_sums, make_train_functions

pytestmark = pytest.mark.usefixtures("optax_promotion")

IDS = np.asarray(jax.random.randint(jax.random.key(7), (4, 48), 0, tiny.VOCAB), np.int32)
UNIGRAM = np.full(tiny.VOCAB, 1 / tiny.VOCAB, np.float32)
ONE = MeshConfig(data=1)


@pytest.fixture(scope="module", autouse=True)
def _empty_caches():
    """These tests count compilations in a cache that the tests of a whole session would fill."""
    jax.clear_caches()



def with_train(config=tiny.CONFIG, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def train(config, count, devices=1):
    """State after `count` updates on the same batch, and the metrics of each."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, tiny.VOCAB, mesh)
        state, metrics = functions.init(jax.random.key(0)), []
        for _ in range(count):
            state, one = functions.step(state, IDS, UNIGRAM)
            metrics.append({name: float(value) for name, value in one.items()})
        assert functions.step._cache_size() == 1
        return jax.device_get(state), metrics


@functools.cache
def steps(config, count, devices=1):
    """State and metrics after `count` updates, computed once."""
    state, metrics = train(config, count, devices)
    return state, metrics[-1]


@pytest.mark.parametrize("objective", [
    ObjectiveConfig(), ObjectiveConfig(negatives="full"), ObjectiveConfig(kind="ar"),
    ObjectiveConfig(negatives="batch", learn_logit_scale=True, logit_scale=10.0),
], ids=["uniform", "full", "ar", "batch, learned scale"])
def test_training_lowers_the_loss(objective):
    config = dataclasses.replace(tiny.CONFIG, objective=objective, optimizer=OptimizerConfig(warmup_steps=1))
    _, metrics = train(config, 25)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_one_large_batch(parts):
    # Micro-batches add in another order: errors of a few units in the last place of gradients of size ~1, times lr.
    whole, metrics = steps(tiny.CONFIG, 1)
    parts, micro_metrics = steps(with_train(accumulation=parts), 1)
    assert metrics["loss"] == pytest.approx(micro_metrics["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(micro_metrics["grad_norm"], rel=1e-5)
    chex.assert_trees_all_close(whole.opt_state[1][0].mu, parts.opt_state[1][0].mu, atol=1e-6, rtol=1e-7)


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=1, fsdp=4), MeshConfig(data=2, fsdp=1, tensor=2),
                                  MeshConfig(data=1, fsdp=2, tensor=2)], ids=str)
def test_a_step_on_four_devices_is_a_step_on_one(mesh):
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(warmup_steps=0))
    one, metrics = steps(config, 1)
    four, metrics_of_four = steps(dataclasses.replace(config, mesh=mesh), 1, devices=4)
    assert metrics["loss"] == pytest.approx(metrics_of_four["loss"], rel=1e-5)
    chex.assert_trees_all_close(one.opt_state[1][0].mu, four.opt_state[1][0].mu, atol=1e-5, rtol=1e-7)


@pytest.mark.parametrize("kind", ["maturation", "ar"])
def test_a_step_on_eight_devices_is_a_step_on_one_under_every_mesh(kind):
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=4", "count=8"),
                        "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parents[1] / "eight_devices.py"
    ran = subprocess.run([sys.executable, script, kind], env=env, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert [tuple(row["shard"]) for row in found] == [(2, 16, 64), (2, 2, 64), (2, 16, 32), (2, 16, 8), (2, 8, 32)]
    for row in found:
        assert row["apart"] < 1e-5, row
        assert row["compiled"] == 1, row
        np.testing.assert_allclose(*row["losses"], rtol=1e-5)


def test_remat_changes_nothing_but_what_is_kept():
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(warmup_steps=0))
    found = [steps(dataclasses.replace(config, compute=ComputeConfig(remat=remat)), 1)
             for remat in ("none", "products", "blocks")]
    for state, metrics in found[1:]:
        assert metrics["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-6)
        # The same sums, fused otherwise: a few units in the last place of gradients of size ~1.
        chex.assert_trees_all_close(state.opt_state[1][0].mu, found[0][0].opt_state[1][0].mu, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["maturation", "ar"])
def test_bfloat16_stays_near_float32(kind):
    config = dataclasses.replace(tiny.CONFIG, objective=ObjectiveConfig(kind=kind))
    low = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    one, metrics = steps(config, 1)
    other, rounded = steps(low, 1)
    # 2⁻⁸ is a unit in the last place; errors of a step add up at random over two blocks.
    assert rounded["loss"] == pytest.approx(metrics["loss"], rel=2**-8)
    exact, near = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.opt_state[1][0].mu)])
                   for state in (one, other))
    assert np.linalg.norm(exact - near) < 0.05 * np.linalg.norm(exact)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(other.params))


def largest_array(config, vocab_size):
    """Elements of the largest value in a step's program."""
    functions = make_train_functions(config, vocab_size, sharding.make_mesh(ONE, jax.devices()[:1]))
    ids = jax.ShapeDtypeStruct((config.train.batch_size, config.data.seq_len), jnp.int32)
    unigram = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
    program = functions.step.lower(functions.shapes, ids, unigram).as_text()
    shapes = re.findall(r"tensor<([0-9x]+)x[a-z]", program)
    return max(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.mark.parametrize("objective", [
    ObjectiveConfig(), ObjectiveConfig(negatives="full"), ObjectiveConfig(kind="ar")], ids=["uniform", "full", "ar"])
def test_no_array_has_the_scores_of_all_positions_against_all_of_v(objective):
    vocab_size, config = 50_000, dataclasses.replace(tiny.CONFIG, objective=objective)
    config = with_train(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=512)), batch_size=4)
    assert largest_array(config, vocab_size) < 2**25 < 4 * 511 * vocab_size


def test_parameters_and_moments_are_split_and_stay_so():
    config = dataclasses.replace(tiny.CONFIG, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, tiny.VOCAB, mesh)
        state = functions.init(jax.random.key(0))
        state, _ = functions.step(state, IDS, UNIGRAM)
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        kernel = tree["backbone"]["blocks"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 8, 8)
        assert tree["backbone"]["blocks"]["mlp_out"]["kernel"].addressable_shards[0].data.shape == (2, 32, 8)
        # 61 rows do not split in two: the axis is dropped, the other one holds.
        assert tree["table"].addressable_shards[0].data.shape == (61, 8)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(warmup_steps=0))
    one, _ = train(config, 2)
    two, _ = train(config, 2)
    chex.assert_trees_all_equal(one, two)
    other, _ = steps(with_train(config, seed=1), 2)
    assert not np.array_equal(one.params["table"], other.params["table"])


def test_a_frozen_table_never_moves():
    config = dataclasses.replace(tiny.CONFIG, table=dataclasses.replace(tiny.CONFIG.table, trainable=False),
                                 optimizer=OptimizerConfig(warmup_steps=0))
    state, _ = steps(config, 2)
    np.testing.assert_array_equal(state.params["table"], init_params(jax.random.key(0), config, tiny.VOCAB)["table"])


def test_muon_orthogonalises_each_layers_matrix():
    config = OptimizerConfig(name="muon", warmup_steps=0, muon_learning_rate=0.1, weight_decay=0.0, schedule="constant",
                             clip_norm=1e9)
    params = init_params(jax.random.key(0), tiny.CONFIG, tiny.VOCAB)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kernels = updates["backbone"]["blocks"]["query"]["kernel"]
    for layer in np.asarray(kernels):
        singular = np.linalg.svd(layer, compute_uv=False)
        # Five Newton–Schulz steps leave singular values within about 0.7..1.2 of one another.
        assert singular.max() / singular.min() < 2.0
    assert np.linalg.svd(np.asarray(updates["table"]), compute_uv=False)[[0, -1]].tolist() != [1.0, 1.0]


def test_muon_trains_on_a_mesh():
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(name="muon", warmup_steps=1),
                                 mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    _, metrics = train(config, 15, devices=4)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_decay_touches_matrices_alone():
    params = init_params(jax.random.key(0), tiny.CONFIG, tiny.VOCAB)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, weight_decay=0.5, learning_rate=0.1), 10)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    moved = {sharding.path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if np.any(leaf)}
    assert moved
    assert all(name.endswith("kernel") for name in moved)


def test_schedules_by_hand():
    config = OptimizerConfig(schedule="linear", warmup_steps=10, final_share=0.1)
    schedule = make_schedule(config, 1.0, 110)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.55, 0.1], rtol=1e-5)
    cosine = make_schedule(dataclasses.replace(config, schedule="cosine"), 1.0, 110)
    np.testing.assert_allclose([cosine(step) for step in (10, 60, 110)], [1, 0.55, 0.1], rtol=1e-5)
    constant = make_schedule(dataclasses.replace(config, schedule="constant"), 2.0, 110)
    np.testing.assert_allclose([constant(step) for step in (10, 110)], [2, 2])


def test_clipping_bounds_the_gradient():
    config = OptimizerConfig(clip_norm=0.5)
    grads = {"kernel": jnp.full((3, 3), 100.0)}
    clipped, _ = optax.clip_by_global_norm(config.clip_norm).update(grads, optax.EmptyState())
    optimizer = make_optimizer(config, 10)
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(state[1][0].mu["kernel"], 0.1 * clipped["kernel"], rtol=1e-5)


def test_validation_counts_each_position_once_by_its_maturity():
    params = tiny.shaken_params()
    sums = jax.device_get(eval_sums(params, jnp.asarray(IDS), jnp.asarray(UNIGRAM), jnp.int32(0), tiny.CONFIG))
    counts = {name: value for name, value in sums.items() if name.startswith("count/")}
    assert sum(counts.values()) == 4 * 47
    assert counts["count/maturity_1"] > 47
    means = eval_means(sums)
    for name in ("top1/maturity_1", "top5/maturity_1"):
        assert 0 <= means[name] <= 1
    assert means["top5/maturity_1"] >= means["top1/maturity_1"]
    assert 0 < means["entropy/maturity_1"] <= np.log(tiny.VOCAB) + 1e-5


def test_accuracy_is_one_where_the_prediction_is_the_target(monkeypatch):
    from tokmat_jax.training import step as train_step

    params = tiny.shaken_params()

    def perfect(params, ids, keys, config, forward):
        windows = train_step.objective.PredictedWindows
        tokens = vocabulary_of(params, config)
        return windows(tokens, ids[:, 1:], jnp.ones((4, 47)), tokens.table[ids[:, 1:]])

    monkeypatch.setattr(train_step.objective, "run_windows", perfect)
    means = eval_means(eval_sums(params, jnp.asarray(IDS), jnp.asarray(UNIGRAM), jnp.int32(0), tiny.CONFIG))
    assert means["top1/maturity_1"] == 1.0
    assert means["mse"] == 0.0


def test_the_baselines_perplexity_is_the_exponential_of_its_cross_entropy():
    means = eval_means({"loss": 6.0, "cross_entropy": 6.0, "weight": 3.0})
    assert means["perplexity"] == pytest.approx(np.exp(2.0))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_training_step_lowers_for_accelerators(platform):
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = make_train_functions(tiny.CONFIG, tiny.VOCAB, mesh)
        exported = jax.export.export(functions.step, platforms=[platform])(
            functions.shapes, jax.ShapeDtypeStruct((4, 48), jnp.int32), jax.ShapeDtypeStruct((tiny.VOCAB,), jnp.float32)
        )
    assert exported.platforms == (platform,)
