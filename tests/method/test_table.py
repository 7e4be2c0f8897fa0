import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.method import table


@given(st.integers(0, 1000), st.floats(0.1, 50.0))
def test_every_row_lies_on_the_sphere(seed, radius):
    rows = table.sphere(3.0 * jax.random.normal(jax.random.key(seed), (7, 5)), radius)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), radius, rtol=1e-5)


def test_projection_is_the_nearest_row():
    rows = table.sphere(jax.random.normal(jax.random.key(0), (40, 6)), 2.0)
    z = jax.random.normal(jax.random.key(1), (3, 4, 6))
    distance = np.linalg.norm(np.asarray(z)[:, :, None] - np.asarray(rows)[None, None], axis=-1)
    np.testing.assert_array_equal(table.read(z, table.make_vocabulary(rows), 1.0)[0], distance.argmin(-1))


def test_projection_of_a_row_is_its_own_id():
    rows = table.sphere(jax.random.normal(jax.random.key(2), (50, 8)), 1.0)
    tokens, _ = table.read(table.look_up(rows, jnp.arange(50)), table.make_vocabulary(rows), 1.0)
    np.testing.assert_array_equal(tokens, np.arange(50))


@pytest.mark.parametrize("geometry", ["sphere", "raw"])
def test_read_gives_nearest_token_and_entropy_in_nats(geometry):
    temperature = 0.25
    rows = jax.random.normal(jax.random.key(3), (30, 8))
    rows = table.sphere(rows, 3.0) if geometry == "sphere" else rows
    z = jax.random.normal(jax.random.key(4), (5, 8))
    tokens, entropy = table.read(z, table.make_vocabulary(rows), jnp.float32(temperature))
    e, v = np.asarray(rows, np.float64), np.asarray(z, np.float64)
    cos = v @ e.T / np.linalg.norm(v, axis=1)[:, None] / np.linalg.norm(e, axis=1)[None]
    p = np.exp(cos / temperature)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(tokens, (v @ e.T).argmax(-1))


def test_an_output_table_of_its_own_is_what_a_front_is_compared_with():
    rows, readout = jnp.eye(3), jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [2.0, 0.0, 0.0]])
    tokens, entropy = table.read(jnp.eye(3), table.make_vocabulary(rows, readout), 1.0)
    np.testing.assert_array_equal(tokens, [2, 0, 1])
    p = np.array([np.e, 1.0, 1.0]) / (np.e + 2.0)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-6)


def test_a_zero_vector_has_the_entropy_of_the_uniform_distribution():
    rows = table.sphere(jax.random.normal(jax.random.key(5), (32, 4)), 1.0)
    _, entropy = table.read(jnp.zeros((1, 4)), table.make_vocabulary(rows), 1.0)
    np.testing.assert_allclose(entropy, np.log(32), rtol=1e-6)


@pytest.mark.parametrize("piece", [1, 7, 20, 29])
def test_reading_the_vocabulary_in_pieces_changes_nothing(monkeypatch, piece):
    rows = 3.0 * jax.random.normal(jax.random.key(0), (30, 4))
    z = jax.random.normal(jax.random.key(1), (2, 3, 4)).at[0, 0].set(rows[4])
    targets = jnp.array([[4, 29, 0], [1, 2, 3]])
    # Two equal rows in different pieces: the first one is the nearest.
    vocabulary = table.make_vocabulary(rows.at[28].set(rows[4]))
    whole = table.read(z, vocabulary, 0.3), table.rank_and_entropy(z, targets, vocabulary)
    monkeypatch.setattr(table, "_SMALLEST_PIECE", 1)
    monkeypatch.setattr(table, "_AT_ONCE", 6 * piece)
    pieces = table.read(z, vocabulary, 0.3), table.rank_and_entropy(z, targets, vocabulary)
    inner = np.asarray(z, np.float64) @ np.asarray(vocabulary.readout, np.float64).T
    cosine = inner / np.linalg.norm(z, axis=-1, keepdims=True) / np.linalg.norm(vocabulary.readout, axis=-1)
    for (nearest, entropy), (rank, plain) in (whole, pieces):
        np.testing.assert_array_equal(nearest, inner.argmax(-1))
        own = np.take_along_axis(inner, np.asarray(targets)[..., None], -1)
        np.testing.assert_array_equal(rank, (inner > own).sum(-1))
        for got, temperature in ((entropy, 0.3), (plain, 1.0)):
            p = np.exp(cosine / temperature)
            p /= p.sum(-1, keepdims=True)
            # A sum of 30 terms below 4 in float32.
            np.testing.assert_allclose(got, -(p * np.log(p)).sum(-1), atol=1e-5)


def test_a_vector_that_is_not_a_number_hits_nothing():
    rows = jax.random.normal(jax.random.key(0), (30, 4))
    rank, _ = table.rank_and_entropy(jnp.full((1, 4), jnp.nan), jnp.array([3]), table.make_vocabulary(rows))
    assert rank.tolist() == [30]


@pytest.mark.parametrize(("count", "temperature"), [(3, 1.0), (50, 0.2), (99, 1.0)])
def test_entropy_over_the_nearest_tokens_by_hand(count, temperature):
    rows = table.sphere(jax.random.normal(jax.random.key(0), (60, 8)), 2.0)
    z = jax.random.normal(jax.random.key(1), (5, 8))
    cosine = np.sort(np.asarray(table.unit(z) @ table.unit(rows).T), axis=-1)[:, ::-1][:, :count]
    share = np.exp(cosine / temperature)
    share /= share.sum(-1, keepdims=True)
    got = table.nearest_entropy(z, table.make_vocabulary(rows, radius=2.0), count, temperature)
    np.testing.assert_allclose(got, -(share * np.log(share)).sum(-1), rtol=1e-5)
    if count == 99:  # more than there are: all of V
        np.testing.assert_allclose(got, table.read(z, table.make_vocabulary(rows, radius=2.0), 1.0)[1], rtol=1e-5)
