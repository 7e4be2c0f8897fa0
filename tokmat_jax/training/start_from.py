"""Starting a run from another one's model: imported weights, an autoregressive baseline, or a maturation run.

A backbone that was autoregressive begins with its own function at every maturity and every K; only its head is made
small (METHOD §2: outputs of full length destroy it).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokmat_jax.config import Config
from tokmat_jax.config.adopt import check_source
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.distributed.mesh import path_name
from tokmat_jax.errors import UserError
from tokmat_jax.method.table import look_up
from tokmat_jax.model.backbone import Params, make_forward, maturity_of_committed
from tokmat_jax.model.lora import join_params
from tokmat_jax.model.params import vocabulary_of
from tokmat_jax.storage.model import fingerprint, load_plain
from tokmat_jax.storage.workdir import TOKENIZER, load_config


def load_source(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Params, Config]:
    """Parameters of the run that `config.init_from` names, placed on `mesh`, and its config.

    Raises UserError unless its model has the shape and its tokenizer the ids that this run asks for.
    """
    assert config.init_from is not None
    path = Path(config.init_from)
    check_source(config, load_config(path))
    if not load_tokenizer(path / TOKENIZER).same_ids(tokenizer):
        raise UserError(f"init_from: {path} has another tokenizer than this run's corpus: take --tokenizer.kind "
                        f"workdir --tokenizer.name {path}")
    return load_plain(path, tokenizer.vocab_size, mesh)


_ROWS = 4
"""Windows on which the length of predictions is measured."""


def starting_params(fresh: Params, windows: Sequence[dict[str, Any]], tokenizer: Tokenizer, config: Config,
                    mesh: Mesh) -> tuple[Params, Config, str]:
    """Parameters of a run that starts from `config.init_from`, placed as `fresh` ones are; the source's config, and its
    fingerprint.

    `windows` hold `tokens` [T], on which the length of predictions is measured.
    """
    source, of_source = load_source(config, tokenizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    ids = np.stack([windows[index]["tokens"] for index in range(min(_ROWS, len(windows)))])
    start = jax.jit(initial_params, static_argnums=(3, 4), out_shardings=placed)
    return start(source, fresh, ids, of_source, config), of_source, fingerprint(source)


def initial_params(source: Params, fresh: Params, ids: jax.Array, source_config: Config, config: Config) -> Params:
    """Parameters of a run with `config` that starts from those of `source`.

    `fresh` are initialised ones of the right shapes. A head that was autoregressive is made small: on the text
    `ids` [B, T] the mean ‖ẑ‖ becomes head_init · R.
    """
    backbone = dict(source["backbone"])
    on_sphere = config.table.geometry == "sphere"
    params = fresh | {"table": _directed(source["table"], fresh["table"]) if on_sphere else source["table"]}
    if config.adapter.rank:
        backbone["blocks"] = join_params(fresh["backbone"]["blocks"], backbone["blocks"])
    if "readout" in fresh:
        params["readout"] = source["readout"]
    if "log_logit_scale" in fresh and "log_logit_scale" in source:
        params["log_logit_scale"] = source["log_logit_scale"]
    if source_config.objective.kind == "maturation":
        return params | {"backbone": backbone}
    if config.objective.kind == "tail":
        return _with_tail(params | {"backbone": backbone}, fresh, ids, source_config, config)
    backbone = _neutral_conditioning(backbone, fresh["backbone"], source_config)
    if config.model.head == "identity":
        return params | {"backbone": backbone}
    if "head" not in backbone:
        backbone["head"] = {"kernel": _head(source, source_config, config)}
    if config.objective.kind == "maturation":
        small = config.model.head_init * config.table.radius / _length(params | {"backbone": backbone}, ids, config)
        backbone["head"] = {"kernel": small * backbone["head"]["kernel"]}
    return params | {"backbone": backbone}


_NO_DIRECTION = 1e-6
"""A row whose norm is below this share of the mean has no direction."""


def _directed(table: jax.Array, fresh: jax.Array) -> jax.Array:
    """`table` [V, d], in which rows of zeros, as reserved tokens have, point where those of `fresh` do: on the sphere a
    row needs a direction, and the gradient of a row is the larger the shorter the row is."""
    norm, other = (jnp.linalg.norm(rows, axis=-1, keepdims=True) for rows in (table, fresh))
    return jnp.where(norm > _NO_DIRECTION * jnp.mean(norm), table, fresh * (jnp.mean(norm) / other))


def _with_tail(params: Params, fresh: Params, ids: jax.Array, source_config: Config, config: Config) -> Params:
    """`params` of a language model with the parts of a tail in front of it, whose slots predict as it does, but
    shorter."""
    size, backbone = config.model.embed_dim, params["backbone"]
    small = config.model.head_init * config.table.radius / _length(params, ids, source_config)
    kernel = backbone["head"]["kernel"] if "head" in backbone else jnp.eye(size)
    added = {name: leaf for name, leaf in fresh["backbone"].items() if name.startswith("slot_")}
    backbone = _with_row_zero(backbone, fresh["backbone"]) | added | {"slot_head": {"kernel": small * kernel}}
    return params | {"backbone": backbone}


def _length(params: Params, ids: jax.Array, config: Config) -> jax.Array:
    """Mean ‖ẑ‖ [] over the positions of `ids` [B, T], all committed."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)
    clean = look_up(vocabulary_of(params, config).table, ids)
    no_tail = jnp.zeros((ids.shape[0],), jnp.int32)
    prediction, _ = make_forward(config)(params["backbone"], clean, jnp.ones(ids.shape), no_tail, positions)
    return jnp.mean(jnp.linalg.norm(prediction, axis=-1))


def _neutral_conditioning(backbone: Params, fresh: Params, source_config: Config) -> Params:
    """`backbone` with conditioning that is at every maturity and K what it was at maturity 1 and K = 0."""
    out = {"kernel": jnp.zeros_like(fresh["maturity"]["out"]["kernel"]),
           "bias": maturity_of_committed(backbone, source_config)}
    return _with_row_zero(backbone | {"maturity": fresh["maturity"] | {"out": out}}, fresh)


def _with_row_zero(backbone: Params, fresh: Params) -> Params:
    """`backbone` with as many rows of FiLM as `fresh` has, all of them that of K = 0."""
    rows_of = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}

    def row_zero(path, leaf):
        name = path_name(path)
        return jnp.broadcast_to(leaf[..., :1, :], rows_of[name].shape) if "film/embed" in name else leaf

    return jax.tree_util.tree_map_with_path(row_zero, backbone)


def _head(source: Params, source_config: Config, config: Config) -> jax.Array:
    """The matrix [d, d] after which ⟨ẑ, e_i⟩ ranks tokens as the source does: the identity with a tied table.

    With an output table W of its own, the least-squares solution of E H = W, so that ⟨x Hᵀ, e_i⟩ ≈ ⟨x, w_i⟩.
    """
    size = config.model.embed_dim
    if source_config.table.tied:
        return jnp.eye(size)
    table, readout = vocabulary_of({"table": source["table"]}, config).table, source["readout"]
    return jnp.linalg.solve(table.T @ table, table.T @ readout).T
