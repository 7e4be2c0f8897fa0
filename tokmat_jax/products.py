"""Products with a matrix of a block, fast for few rows too."""

import jax
import jax.numpy as jnp

_FEW = 8
"""Maximum number of rows that a CPU multiplies one by one."""


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x` [N, in] times `matrix` [in, out] → [N, out].

    On a CPU, 2 to 8 rows are multiplied one by one: XLA would otherwise copy the whole matrix into another layout at
    every call, which takes longer than the product. Each row is then rounded as if it were alone. It is faster for a
    matrix that stays in the processor's cache between two rows; the vocabulary table does not.
    """
    if not 2 <= x.shape[0] <= _FEW:
        return x @ matrix
    return jax.lax.platform_dependent(x, matrix, cpu=_one_by_one, default=jnp.matmul)


def _one_by_one(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.concatenate([x[row : row + 1] @ matrix for row in range(x.shape[0])])
