"""Names, shapes, types and checksums in a checkpoint, by which damage is found when it is read.

A checksum does not depend on how an array is split over devices.
"""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from tokmat_jax.distributed.mesh import path_name, replicated

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def bit_sum(array: jax.Array) -> jax.Array:
    """Σ bits_i · (2 i + 1) modulo 2³², uint32 [], over the elements i of `array` in order.

    The weights are odd, so flipping any one bit changes the sum. They differ, so swapping two elements almost always
    changes it.
    """
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    weight, stride = jnp.ones(array.shape, jnp.uint32), 2
    for axis in reversed(range(array.ndim)):
        weight += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaves: list[jax.Array], mesh: Mesh | None) -> jax.Array:
    sums = jnp.stack([bit_sum(leaf) for leaf in leaves])
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, replicated(mesh))


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "dtype"}} of the leaves of `tree`, arrays or ShapeDtypeStructs."""
    return {
        path_name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def summed(tree: Any) -> dict[str, dict[str, Any]]:
    """As `describe`, for arrays, with the `sum` of each leaf's bits. Every process of a run must call it."""
    leaves = jax.tree.leaves(tree)
    where = leaves[0].sharding
    sums = jax.device_get(_sums(leaves, where.mesh if isinstance(where, NamedSharding) else None)).tolist()
    return {name: {**facts, "sum": one} for (name, facts), one in zip(describe(tree).items(), sums, strict=True)}


def seal(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` (JSON data) with their `digest` added."""
    return {**facts, "digest": _digest(facts)}


def is_sealed(facts: Any) -> bool:
    """Whether `facts` are unchanged since `seal` returned them."""
    return isinstance(facts, dict) and facts.get("digest") == _digest(
        {name: value for name, value in facts.items() if name != "digest"})


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
