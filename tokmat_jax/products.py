"""Products with a large matrix, fast for few rows too."""

from typing import Any

import jax
import jax.numpy as jnp

_FEW = 8
"""Maximum number of rows that a CPU multiplies one by one."""


def product(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
    """`x` [N, in] times `matrix` [in, out] → [N, out], accumulated in `dtype` (None: theirs).

    On a CPU, 2 to 8 rows are multiplied one by one: XLA would otherwise copy the whole matrix into another layout at
    every call, which takes longer than the product. Each row is then rounded as if it were alone.
    """
    def whole(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.matmul(x, matrix, preferred_element_type=dtype)

    def one_by_one(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.concatenate([whole(x[row : row + 1], matrix) for row in range(x.shape[0])])

    if not 2 <= x.shape[0] <= _FEW:
        return whole(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=one_by_one, default=whole)
