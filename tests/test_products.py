"""Few rows: the same product on every platform, and on a CPU each row as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.products import product


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
