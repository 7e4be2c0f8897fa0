import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from tokmat_jax.config import ModelConfig
from tokmat_jax.model.backbone import make_backbone, make_forward, sinusoidal_embedding
from tokmat_jax.model.params import init_params


def inputs(batch=2, length=9, seed=0):
    z = jax.random.normal(jax.random.key(seed), (batch, length, 16))
    maturity = jax.random.uniform(jax.random.key(seed + 1), (batch, length))
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    return z, maturity, jnp.full((batch,), 4), positions


@pytest.mark.parametrize("film", ["once", "per_layer"])
def test_the_future_and_other_rows_change_nothing(film):
    config = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, film=film))
    params, forward, _ = tiny.model(config)
    z, maturity, tail_length, positions = inputs()
    before, _ = forward(params, z, maturity, tail_length, positions)
    after, _ = forward(params, z.at[0, 5:].add(1.0), maturity.at[0, 5:].set(0.3), tail_length, positions)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    np.testing.assert_array_equal(before[1], after[1])
    assert (np.abs(before[0, 5:] - after[0, 5:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("film", ["once", "per_layer"])
def test_maturity_and_tail_length_condition_the_prediction(film):
    config = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, film=film))
    params, forward, _ = tiny.model(config)
    z, maturity, tail_length, positions = inputs()
    plain, _ = forward(params, z, maturity, tail_length, positions)
    assert np.abs(plain - forward(params, z, maturity + 0.1, tail_length, positions)[0]).max() > 1e-3
    assert np.abs(plain - forward(params, z, maturity, tail_length + 1, positions)[0]).max() > 1e-3


def test_a_tail_longer_than_any_in_training_is_read_as_the_longest():
    params, forward, _ = tiny.model()
    z, maturity, _, positions = inputs()
    longest, _ = forward(params, z, maturity, jnp.full((2,), 16), positions)
    longer, _ = forward(params, z, maturity, jnp.full((2,), 40), positions)
    np.testing.assert_array_equal(longest, longer)


def test_conditioning_is_neutral_at_initialisation():
    params = init_params(jax.random.key(0), tiny.CONFIG, tiny.VOCAB)["backbone"]
    forward = make_forward(tiny.CONFIG)
    z, maturity, tail_length, positions = inputs()
    plain, _ = forward(params, z, jnp.ones_like(maturity), tail_length, positions)
    np.testing.assert_array_equal(plain, forward(params, z, maturity, tail_length + 3, positions)[0])


@pytest.mark.parametrize(("radius", "size"), [(1.0, 64), (20.0, 256)])
def test_the_head_starts_small(radius, size):
    config = dataclasses.replace(
        tiny.CONFIG, model=ModelConfig(embed_dim=size, num_layers=1),
        table=dataclasses.replace(tiny.CONFIG.table, radius=radius),
    )
    params = init_params(jax.random.key(0), config, tiny.VOCAB)["backbone"]
    z = jax.random.normal(jax.random.key(1), (4, 8, size))
    positions = jnp.broadcast_to(jnp.arange(8)[None], (4, 8))
    prediction, _ = make_forward(config)(params, radius * z, jnp.ones((4, 8)), jnp.zeros((4,), jnp.int32), positions)
    # The head's d² weights have relative spread 1/√(2d²) in ‖ẑ‖²; 15 % leaves room for the bias of the mean norm.
    np.testing.assert_allclose(np.linalg.norm(prediction, axis=-1).mean(), 0.5 * radius, rtol=0.15)


def test_bfloat16_computes_what_float32_does_to_its_precision():
    low = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, dtype="bfloat16"))
    params, forward, _ = tiny.model()
    args = inputs()
    exact, _ = forward(params, *args)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes bfloat16 and float32 inside
        rounded, live = make_forward(low)(params, *args)
    assert rounded.dtype == jnp.float32
    assert live.key.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: errors of 2⁻⁸ per operation, some tens of them in a row.
    assert np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.05


def test_the_papers_model_has_the_shape_of_gpt2_medium():
    config = dataclasses.replace(
        tiny.CONFIG, data=dataclasses.replace(tiny.CONFIG.data, seq_len=1024),
        model=ModelConfig(embed_dim=1024, num_layers=24, num_heads=16),
    )
    scalar = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(make_backbone(config).init, jax.random.key(0), jnp.zeros((1, 1, 1024)), jnp.ones((1, 1)),
                            scalar[0], scalar)["params"]
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    blocks = 24 * (12 * 1024**2 + 13 * 1024)
    conditioning = 2 * (1024**2 + 1024) + 17 * 2 * 1024
    head = 1024**2
    assert size == blocks + 1024 * 1024 + 2 * 1024 + conditioning + head


def test_sinusoidal_embedding_is_the_equation():
    got = sinusoidal_embedding(jnp.array([0.25]), 6)
    angle = 250.0 * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(got, [np.concatenate([np.sin(angle), np.cos(angle)])], atol=1e-4)
