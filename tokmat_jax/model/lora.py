"""Low-rank adapters of the blocks' matrices (LoRA; Hu et al. 2021, arXiv:2106.09685), and what an adapter run trains.

    y = x W + b + g ⊙ s · (dropout(x) A) B          A [in, r] random, B [r, out] zero at first

g is 1 at every position, or, with a tail in front of a language model, only at the positions of its slots. A run with
an adapter trains A and B and what maturation adds to a language model; everything else stays as it was.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokmat_jax.config import AdapterConfig, Config
from tokmat_jax.distributed.mesh import path_name

ADDED = r"lora_[ab]$|^backbone/(maturity|film|head)/|/film/|^log_logit_scale$"
"""Paths of what a run with an adapter trains."""
_IN_FRONT = r"lora_[ab]$|^backbone/slot_"
"""Paths of what a tail in front of a language model trains."""


def adapter_output(
    param: Callable[..., jax.Array], name: str, x: jax.Array, features: int, adapter: AdapterConfig,
    gate: jax.Array | None, keys: jax.Array | None,
) -> jax.Array | float:
    """g ⊙ s · (dropout(x) A) B [B, T, features] of the matrix `name` for its inputs `x` [B, T, in], in their type; 0 if
    it has no adapter.

    `param(name, init, shape)` gives A and B; `gate` is g [B, T, 1], or None for 1; `keys` [B] are those of dropout, one
    per row, or None.
    """
    rank = adapter.rank
    if not rank or name not in adapter.matrices:
        return 0.0
    down = param("lora_a", jax.nn.initializers.normal(x.shape[-1] ** -0.5), (x.shape[-1], rank))
    up = param("lora_b", jax.nn.initializers.zeros, (rank, features))
    if keys is not None:
        x = x * _kept(keys, adapter, name, x.shape[1:]).astype(x.dtype)
    low = adapter.scale * (x @ down.astype(x.dtype))
    return (low if gate is None else gate.astype(x.dtype) * low) @ up.astype(x.dtype)


def _kept(keys: jax.Array, adapter: AdapterConfig, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Factors [B, *shape] of dropout: 0 with its probability p, else 1 / (1 − p); a row depends on its key alone."""
    share, number = 1.0 - adapter.dropout, adapter.matrices.index(name)
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), share, shape))(keys)
    return kept.astype(jnp.float32) / share


def dropout_keys(keys: jax.Array, config: Config) -> jax.Array | None:
    """One key per layer and row [L, B] from row `keys` [B]; None if nothing is dropped."""
    if not config.adapter.rank or config.adapter.dropout == 0:
        return None
    layers = jnp.arange(config.model.num_layers)
    return jax.vmap(lambda layer: jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys))(layers)


def fold_adapter(params: Any, config: Config) -> tuple[Any, Config]:
    """The plain model that computes what `params` with their adapters do, and its config: W + s A B in the place of W.

    A tail in front of a language model is returned unchanged: its adapters act at slots alone.
    """
    if config.adapter.rank is None or config.objective.kind == "tail":
        return params, config
    return _folded(params, config.adapter.scale), dataclasses.replace(config, adapter=AdapterConfig())


def _folded(params: Any, scale: float) -> Any:
    if not isinstance(params, dict):
        return params
    if "lora_a" not in params:
        return {name: _folded(value, scale) for name, value in params.items()}
    rest = {name: value for name, value in params.items() if not name.startswith("lora_")}
    added = jnp.matmul(params["lora_a"], params["lora_b"], precision=jax.lax.Precision.HIGHEST)
    return rest | {"kernel": params["kernel"] + scale * added}


def split_params(params: Any, config: Config) -> tuple[Any, Any]:
    """`params` as (what this run trains, what is frozen); everything is trained unless the run has an adapter."""
    if config.trains_all:
        return params, {}
    pattern = _IN_FRONT if config.objective.kind == "tail" else ADDED
    trained, frozen = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _put(trained if re.search(pattern, path_name(path)) else frozen, path, leaf)
    return trained, frozen


def join_params(one: Any, other: Any) -> Any:
    """The leaves of two nested dicts in one; a leaf of `other` counts."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return one | {name: join_params(one[name], value) if name in one else value for name, value in other.items()}


def _put(tree: dict[str, Any], path: tuple[Any, ...], leaf: Any) -> None:
    *parents, last = [entry.key for entry in path]
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
