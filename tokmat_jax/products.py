"""Products with a matrix of a block and with the vocabulary table, fast for few rows too."""

import jax
import jax.numpy as jnp

_FEW = 8
"""Maximum number of rows that a CPU multiplies one by one."""


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x` [N, in] times `matrix` [in, out] → [N, out].

    On a CPU, 2 to 8 rows are multiplied one by one: XLA would otherwise copy the whole matrix into another layout at
    every call, which takes longer than the product. Each row is then rounded as if it were alone. It is faster for a
    matrix that stays in the processor's cache between two rows; for the vocabulary table, see `scores_of_rows`.
    """
    if not 2 <= x.shape[0] <= _FEW:
        return x @ matrix
    return jax.lax.platform_dependent(x, matrix, cpu=_one_by_one, default=jnp.matmul)


def _one_by_one(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.concatenate([x[row : row + 1] @ matrix for row in range(x.shape[0])])


def scores_of_rows(z: jax.Array, table: jax.Array) -> jax.Array:
    """Inner products [N, V] in float32 of `z` [N, d] with the rows of `table` [V, d].

    On a CPU, the few rows of `z` are multiplied by the table, not the table by them: twice as fast for 2 to 8 rows,
    since the table, which is read from memory, is the side that is not copied.
    """
    if not 2 <= z.shape[0] <= _FEW:
        return _scores(z, table)
    return jax.lax.platform_dependent(z, table, cpu=_by_table, default=_scores)


def _scores(z: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("nd,vd->nv", z, table, preferred_element_type=jnp.float32)


def _by_table(z: jax.Array, table: jax.Array) -> jax.Array:
    # Without the barrier, XLA would exchange the sides again to save the transposition.
    return jax.lax.optimization_barrier(jnp.einsum("vd,nd->vn", table, z, preferred_element_type=jnp.float32)).T
