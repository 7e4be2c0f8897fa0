"""The parameters: their initial values, their shapes, and the vocabulary and κ that they hold."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, Sharding

from tokmat_jax.config import Config
from tokmat_jax.distributed.mesh import place
from tokmat_jax.keys import seed_key
from tokmat_jax.method.table import Vocabulary, make_vocabulary, sphere
from tokmat_jax.model.backbone import Params, make_backbone
from tokmat_jax.model.lora import join_params


@struct.dataclass
class TrainState:
    """Everything that an update changes. Random numbers depend only on the seed and `step`, so no key is stored."""

    step: jax.Array
    """Updates done, int32 []."""
    params: Params
    """What the run trains of `table` [V, d] (free rows w), `backbone`, `readout` [V, d] if it is not tied to the table,
    and `log_logit_scale` [] if κ is learned; float32."""
    opt_state: Any
    """State of the optimiser, sharded like the parameters."""
    frozen: Params = struct.field(default_factory=dict)
    """The other parameters, which never change; {} unless the run has an adapter."""

    @property
    def whole(self) -> Params:
        """All parameters of the model."""
        return join_params(self.frozen, self.params)


def init_params(key: jax.Array, config: Config, vocab_size: int, table: jax.Array | None = None) -> Params:
    """Initial parameters; `table` [V, d], if given, holds the rows to start from."""
    backbone_key, table_key = jax.random.split(key)
    size = config.model.embed_dim
    scalar = jnp.zeros((1, 1), jnp.int32)
    backbone = make_backbone(config).init(
        backbone_key, jnp.zeros((1, 1, size)), jnp.ones((1, 1)), scalar[0], scalar
    )["params"]
    if table is None:
        table = jax.random.normal(table_key, (vocab_size, size)) / jnp.sqrt(float(size))
    params = {"backbone": backbone, "table": table}
    if not config.table.tied:
        params["readout"] = table
    if config.objective.learn_logit_scale:
        params["log_logit_scale"] = jnp.log(jnp.float32(config.objective.logit_scale))
    return params


def param_shapes(config: Config, vocab_size: int, where: Mesh | Sharding | None = None) -> Params:
    """The parameters as ShapeDtypeStructs: placed on a mesh by its `RULES`, or all of them by one sharding."""
    shapes = jax.eval_shape(lambda: init_params(seed_key(0), config, vocab_size))
    if where is None:
        return shapes
    placed = place(shapes, where) if isinstance(where, Mesh) else jax.tree.map(lambda _: where, shapes)
    return jax.tree.map(lambda s, own: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=own), shapes, placed)


def logit_scale_of(params: Params, config: Config) -> jax.Array:
    """κ [], fixed or learned."""
    if not config.objective.learn_logit_scale:
        return jnp.float32(config.objective.logit_scale)
    return jnp.exp(params["log_logit_scale"])


def keep_logit_scale_in_range(params: Params) -> Params:
    """`params` with a learned κ clipped to 1..100; applied after the update, so that its gradient never vanishes."""
    if "log_logit_scale" not in params:
        return params
    return params | {"log_logit_scale": jnp.clip(params["log_logit_scale"], 0.0, math.log(100.0))}


def ar_logit_scale_of(params: Params, config: Config) -> jax.Array:
    """Factor [] of ⟨ẑ, e_i⟩ in the baseline's logits: κ/R² on the sphere, κ with a raw table."""
    scale = logit_scale_of(params, config)
    return scale / config.table.radius**2 if config.table.geometry == "sphere" else scale


def vocabulary_of(params: Params, config: Config) -> Vocabulary:
    """E and its readout. A frozen table passes no gradient; a separate output table is used unchanged."""
    table = params["table"]
    if config.table.geometry == "sphere":
        table = sphere(table, config.table.radius)
    if not config.table.trainable:
        table = jax.lax.stop_gradient(table)
    return make_vocabulary(table, params.get("readout"), config.table.radius)
