"""What enters the history: smoothing and noise by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.method.history import Entry, committed_vectors, history_noise

KEYS = jax.random.split(jax.random.key(0), 2)


def test_without_controls_a_token_enters_as_it_is():
    clean = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_array_equal(committed_vectors(clean, clean[:, 0], KEYS, jnp.array([5, 9]), Entry(), 1.0), clean)


def test_smoothing_mixes_each_vector_with_the_one_before_it_by_hand():
    clean = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    quarter = Entry(smoothing=jnp.float32(0.25))
    got = committed_vectors(clean, jnp.array([[0.0, 2.0]]), KEYS[:1], jnp.array([5]), quarter, 1.0)
    # 3/4 (1, 0) + 1/4 (0, 2), then 3/4 (0, 1) + 1/4 of that.
    np.testing.assert_array_equal(got[0], [[0.75, 0.5], [0.1875, 0.875]])


@given(st.integers(0, 30), st.floats(0.0, 0.9), st.floats(0.0, 2.0))
def test_several_at_once_enter_as_they_would_one_by_one(first, smoothing, noise):
    clean, last = jax.random.normal(jax.random.key(first), (2, 3, 4)), jnp.ones((2, 4))
    numbers = Entry(jnp.float32(noise), jnp.float32(smoothing)), 1.5
    first = jnp.array([first, first + 7])
    together = committed_vectors(clean, last, KEYS, first, *numbers)
    for index in range(3):
        alone = committed_vectors(clean[:, index : index + 1], last, KEYS, first + index, *numbers)
        np.testing.assert_allclose(alone[:, 0], together[:, index], rtol=1e-5, atol=1e-6)
        last = alone[:, 0]


def test_noise_is_the_rows_and_the_positions_and_has_the_norm_that_is_asked_for():
    clean = jnp.zeros((2, 1, 4))
    got = committed_vectors(clean, clean[:, 0], KEYS, jnp.array([5, 9]), Entry(jnp.float32(0.5)), 1.0)
    np.testing.assert_array_equal(got[1, 0], history_noise(KEYS[1:], jnp.array([9]), 4, jnp.float32(0.5), 1.0)[0])
    # The row's key and the position decide the noise, nothing else.
    assert np.any(got[0] != history_noise(KEYS[:1], jnp.array([9]), 4, jnp.float32(0.5), 1.0))
    many = history_noise(jax.random.split(jax.random.key(5), 4000), jnp.zeros((4000,), jnp.int32), 2, jnp.float32(0.5),
                         3.0)
    # Mean square of σ_h R: 1.5² up to four standard errors of 4,000 draws in two dimensions.
    np.testing.assert_allclose(jnp.mean(jnp.sum(many**2, -1)), 1.5**2, rtol=4 / 4000**0.5)
