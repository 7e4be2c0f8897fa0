"""Few rows: the same product on every platform, and on a CPU each row as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.products import product, scores_of_rows


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_a_product_is_numpys_and_has_its_gradients(count):
    x, matrix = jax.random.normal(jax.random.key(0), (count, 32)), jax.random.normal(jax.random.key(1), (32, 48))
    wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(jax.jit(product)(x, matrix), wanted, atol=32 * 2**-20)
    got = jax.grad(lambda x, m: jnp.sum(product(x, m) ** 2), (0, 1))(x, matrix)
    for one, other in zip(got, (2 * wanted @ matrix.T, 2 * x.T @ wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_a_row_in_company_is_bit_equal_to_the_row_alone():
    x, matrix = jax.random.normal(jax.random.key(0), (6, 512)), jax.random.normal(jax.random.key(1), (512, 300))
    together = jax.jit(product)(x, matrix)
    for row in range(6):
        np.testing.assert_array_equal(together[row], jax.jit(product)(x[row : row + 1], matrix)[0])


def test_other_platforms_multiply_at_once():
    x, matrix = jnp.ones((6, 16)), jnp.ones((16, 16))
    for platform, dots in (("cpu", 6), ("tpu", 1), ("cuda", 1)):
        lowered = jax.jit(product).trace(x, matrix).lower(lowering_platforms=(platform,)).as_text()
        assert lowered.count("dot_general") == dots


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_scores_are_numpys_and_have_their_gradients(count):
    z, table = jax.random.normal(jax.random.key(0), (count, 32)), jax.random.normal(jax.random.key(1), (48, 32))
    wanted = np.asarray(z, np.float64) @ np.asarray(table, np.float64).T
    np.testing.assert_allclose(jax.jit(scores_of_rows)(z, table), wanted, atol=32 * 2**-20)
    got = jax.grad(lambda z, t: jnp.sum(scores_of_rows(z, t) ** 2), (0, 1))(z, table)
    for one, other in zip(got, (2 * wanted @ table, 2 * wanted.T @ z), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_other_platforms_keep_the_sides_of_scores():
    z, table = jnp.ones((4, 16)), jnp.ones((48, 16))
    for platform, shape in (("cpu", "48x4"), ("tpu", "4x48"), ("cuda", "4x48")):
        lowered = jax.jit(scores_of_rows).trace(z, table).lower(lowering_platforms=(platform,)).as_text()
        assert f"-> tensor<{shape}xf32>" in next(line for line in lowered.splitlines() if "dot_general" in line)
