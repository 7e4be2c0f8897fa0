import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.config import MaturationConfig
from tokmat_jax.method import maturation


def test_linear_profile_by_hand():
    got = maturation.window_maturity(jnp.array([0, 1, 3]), 5, "linear", 0.9)
    want = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0.9], [1, 1, 0.9, 0.6, 0.3]]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_cosine_and_constant_profiles_by_hand():
    got = maturation.window_maturity(jnp.array([2]), 3, "cosine", 0.8)
    np.testing.assert_allclose(got, [[1, 0.8, 0.8 * np.cos(np.pi / 4)]], rtol=1e-6)
    got = maturation.window_maturity(jnp.array([2]), 3, "constant", 0.8)
    np.testing.assert_allclose(got, [[1, 0.8, 0.8]], rtol=1e-6)


@given(st.integers(1, 12), st.sampled_from(["linear", "cosine"]), st.floats(0.05, 1.0))
def test_maturity_falls_along_the_tail_and_stays_positive(length, profile, top):
    tail = np.asarray(maturation.profile_maturity(jnp.arange(length), jnp.array(length), profile, top))
    assert tail[0] == np.float32(top)
    assert (np.diff(tail) < 0).all()
    assert (tail > 0).all()


def test_corruption_has_the_stated_moments():
    radius, sigma, alpha, size, count = 2.0, 0.3, 0.4, 24, 20_000
    clean = jnp.ones((count, size))
    noise = maturation.noise_vector(jax.random.key(0), (count, size), sigma, radius)
    z = np.asarray(maturation.corrupt(clean, noise, jnp.full((count,), alpha)), np.float64)
    # One coordinate has standard deviation (1-α)σR/√d; the mean of all coordinates is within 5 of its own errors.
    deviation = (1 - alpha) * sigma * radius / np.sqrt(size)
    assert abs(z.mean() - alpha) < 5 * deviation / np.sqrt(z.size)
    assert abs(z.std() / deviation - 1) < 5 / np.sqrt(2 * z.size)
    square = np.sum(np.asarray(noise, np.float64) ** 2, -1)
    np.testing.assert_allclose(square.mean(), (sigma * radius) ** 2, rtol=0.02)


def test_draws_follow_the_config_and_depend_on_the_row_alone():
    config = MaturationConfig(max_tail_length=4, no_tail_prob=0.25, history_dropout=0.5, self_condition_prob=0.1)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = maturation.draw_tail(keys, config, 3, 1.0)
    share = np.bincount(np.asarray(draw.tail_length), minlength=5) / 4000
    # Five standard errors of a share p of 4,000 draws are below 5·√(p(1-p)/4000) ≤ 0.04.
    np.testing.assert_allclose(share, [0.25, *[0.1875] * 4], atol=0.04)
    assert abs(float(jnp.mean(draw.history_dropped)) - 0.5) < 0.04
    assert abs(float(jnp.mean(draw.self_conditioned)) - 0.1) < 0.04
    few = maturation.draw_tail(keys[5:7], config, 3, 1.0)
    chex.assert_trees_all_equal(few, jax.tree.map(lambda part: part[5:7], draw))


def test_mixing_touches_the_tail_alone():
    clean = jax.random.normal(jax.random.key(0), (2, 6, 3))
    noise = jnp.zeros((2, 4, 3))
    maturity = maturation.window_maturity(jnp.array([2, 0]), 6, "constant", 0.5)
    z = maturation.mix_tail(clean, noise, maturity)
    np.testing.assert_array_equal(z[0, :4], clean[0, :4])
    np.testing.assert_array_equal(z[0, 4:], 0.5 * clean[0, 4:])
    np.testing.assert_array_equal(z[1], clean[1])


def test_contraction_moves_each_slot_by_its_rate():
    tail, prediction = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 2))
    got = maturation.contract(tail, prediction, jnp.array([1.0, 0.5, 0.0]))
    np.testing.assert_array_equal(got, [[[1, 1], [0.5, 0.5], [0, 0]]])


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 3, 2)])
def test_shift_moves_each_row_by_its_own_count_and_lets_as_many_be_born(shape):
    tail = jnp.broadcast_to(jnp.reshape(jnp.array([1, 2, 3]), (1, 3) + (1,) * (len(shape) - 2)), shape)
    born = jnp.broadcast_to(jnp.reshape(jnp.array([8, 9]), (1, 2) + (1,) * (len(shape) - 2)), (4, 2, *shape[2:]))
    got = np.reshape(maturation.shift(tail, born, jnp.array([1, 0, 2, 1])), (4, 3, -1))
    for last in range(got.shape[-1]):
        np.testing.assert_array_equal(got[..., last], [[2, 3, 8], [1, 2, 3], [3, 8, 9], [2, 3, 8]])


@pytest.mark.parametrize("radius", [1.0, 4.0])
def test_movement_is_in_units_of_the_radius(radius):
    got = maturation.movement(jnp.zeros((1, 2)), radius * jnp.array([[3.0, 4.0]]), radius)
    np.testing.assert_allclose(got, [5.0], rtol=1e-6)
