"""The backbone ẑ = f_θ(z, α, K): a causal pre-norm Transformer from vectors to vectors (METHOD §2).

    z · (input_norm / R) + position + MLP(SinEmb(α))  →  FiLM(K)  →  blocks  →  norm  →  head  →  vectors of d

The output at index t − 1 is the prediction for position t. The model contains no vocabulary. In training, the blocks
are one scan over stacked parameters. In decoding, they are separate, because slicing a stack copies every weight at
every step. The parts of every family of checkpoints (rotary positions, RMSNorm, gated MLPs, grouped heads, windows) are
settings of one model.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tokmat_jax.config import AdapterConfig, ComputeConfig, Config, ModelConfig
from tokmat_jax.distributed.mesh import constrain_activations
from tokmat_jax.model.attention import LayerCache, Sight, attend
from tokmat_jax.model.lora import adapter_output
from tokmat_jax.model.rope import apply_rope, layer_frequencies
from tokmat_jax.products import product

Params = Any
KVCache = tuple[LayerCache, ...]
"""Keys and values of some positions, one LayerCache per layer."""
StackedCache = LayerCache
"""As `KVCache`, but the layers are a leading axis of one LayerCache, as a scan over stacked blocks needs it."""
Forward = Callable[..., tuple[jax.Array, Any]]
"""(params, z, maturity, tail_length, positions, …) → (predictions, keys and values: a KVCache, or a StackedCache if the
blocks of the parameters are stacked), see `make_forward`."""
Model = Callable[..., tuple[jax.Array, Any]]
"""A Forward with its parameters bound: (z, maturity, tail_length, positions, …)."""

_MATURITY_RANGE = 1000.0
_EVERYTHING = np.iinfo(np.int32).max
"""Window of a layer that sees all positions."""
_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def sinusoidal_embedding(maturity: jax.Array, size: int) -> jax.Array:
    """SinEmb(α) [..., size] of `maturity` [...] in [0, 1], spread over 0..1000 as diffusion timesteps are."""
    frequency = jnp.exp(-math.log(10_000.0) * jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angle = jnp.expand_dims(_MATURITY_RANGE * maturity, -1) * jnp.reshape(frequency, (1,) * maturity.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class MaturityConditioning(nn.Module):
    """MLP(SinEmb(α)) [B, T, d]; zero at initialisation."""

    config: ModelConfig

    @nn.compact
    def __call__(self, maturity: jax.Array) -> jax.Array:
        size, dtype = self.config.embed_dim, self.config.dtype
        hidden = nn.Dense(size, dtype=dtype, kernel_init=_fan_in, name="hidden")(sinusoidal_embedding(maturity, size))
        return nn.Dense(size, dtype=dtype, kernel_init=nn.initializers.zeros, name="out")(nn.silu(hidden))


class TailLengthFilm(nn.Module):
    """h ← (1 + γ_K) ⊙ h + β_K; the identity at initialisation. A K above K_max counts as K_max."""

    config: ModelConfig
    max_tail_length: int

    @nn.compact
    def __call__(self, h: jax.Array, tail_length: jax.Array) -> jax.Array:
        size = self.config.embed_dim
        embed = nn.Embed(self.max_tail_length + 1, 2 * size, dtype=self.config.dtype,
                         embedding_init=nn.initializers.zeros, name="embed")
        film = embed(jnp.minimum(tail_length, self.max_tail_length))
        film = film if tail_length.ndim == 2 else film[:, None, :]
        return (1.0 + film[..., :size]) * h + film[..., size:]


class RMSNormPlusOne(nn.Module):
    """x / RMS(x) ⊙ (1 + scale), computed in float32."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        scale = jnp.reshape(1.0 + scale, (1,) * (x.ndim - 1) + (-1,))
        whole = x.astype(jnp.float32)
        square = jnp.mean(whole * whole, axis=-1, keepdims=True)
        return (whole * jax.lax.rsqrt(square + self.epsilon) * scale).astype(self.dtype)


def _norm(config: ModelConfig, name: str) -> nn.Module:
    match config.norm:
        case "rms":
            return nn.RMSNorm(config.norm_epsilon, dtype=config.dtype, name=name)
        case "rms_plus_one":
            return RMSNormPlusOne(config.norm_epsilon, config.dtype, name=name)
        case "layer":
            return nn.LayerNorm(config.norm_epsilon, dtype=config.dtype, name=name)


def _activated(config: ModelConfig, hidden: jax.Array, gate: Callable[[], jax.Array]) -> jax.Array:
    """The hidden units [B, T, M] of an MLP after its activation; `gate` computes the gate's, if it has one."""
    match config.mlp:
        case "gelu":
            return nn.gelu(hidden)
        case "gelu_exact":
            return nn.gelu(hidden, approximate=False)
        case "swiglu":
            return hidden * nn.silu(gate())
        case "geglu":
            return hidden * nn.gelu(gate())


@struct.dataclass
class LayerFacts:
    """What differs between layers; of one layer, or of all with a leading axis L."""

    turns: jax.Array | np.ndarray | None
    """Radians per position of each rotary pair [D_r/2]; None if positions are learned."""
    window: jax.Array | np.ndarray | None
    """Number of positions [] that a position sees; None if every layer sees all."""


def _layer_facts(config: ModelConfig) -> LayerFacts:
    """Those of all layers."""
    windowed = np.isin(np.arange(config.num_layers), config.windowed_layers)
    return LayerFacts(
        layer_frequencies(config) if config.positions == "rotary" else None,
        np.where(windowed, config.attention_window or 0, _EVERYTHING).astype(np.int32) if windowed.any() else None)


class Dense(nn.Module):
    """A matrix of a block, with its adapter if it has one: [B, T, in] → [B, T, features]."""

    features: int
    use_bias: bool
    dtype: str
    kernel_init: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        x = x.astype(self.dtype)
        # Rows and positions become one axis: contracting them separately costs a copy in the backward pass.
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        y = product(x.reshape(-1, x.shape[-1]), kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None, :]
        y = y.reshape(*x.shape[:-1], self.features)
        return y + adapter_output(self.param, str(self.name), x, self.features, self.adapter, gate, keys)


class Block(nn.Module):
    """Pre-norm attention and MLP on the residual stream h [B, T, d].

    Returns h and the keys and values of its positions. The other arguments are those of `Backbone`; `history` and
    `facts` are this layer's.
    """

    config: ModelConfig
    adapter: AdapterConfig
    compute: ComputeConfig
    max_tail_length: int

    @nn.compact
    def __call__(self, h, history, keys, facts, gate, tail_length, positions, mask, num_visible):
        config = self.config
        residual_init = nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")

        def dense(features, name, bias, init=_fan_in):
            layer = Dense(features, bias, config.dtype, init, self.adapter, name=name)
            return lambda x: layer(x, gate, keys)

        def after(name, x):
            return _norm(config, name)(x) if config.norm_placement == "around" else x

        if config.film == "per_layer":
            h = TailLengthFilm(config, self.max_tail_length, name="film")(h, tail_length)
        x = _norm(config, "attention_norm")(h)
        query, key, value = (
            dense(heads * config.head_size, name, config.attention_bias != "none")(x)
            .reshape(*h.shape[:2], heads, config.head_size)
            for name, heads in (("query", config.num_heads), ("key", config.kv_heads), ("value", config.kv_heads))
        )
        if config.query_key_norm:
            query, key = _norm(config, "query_norm")(query), _norm(config, "key_norm")(key)
        if facts.turns is not None:
            query, key = (apply_rope(part, positions, facts.turns, config.rope.attention_factor)
                          for part in (query, key))
        query, key, value = (part.swapaxes(1, 2) for part in (query, key, value))
        live = LayerCache(key, value)
        sight = Sight(positions, facts.window, config.attention_scale)
        seen = attend(query, live, mask, history, num_visible, self.compute.attention, sight)
        seen = seen.swapaxes(1, 2).reshape(*h.shape[:2], -1)
        attended = dense(config.embed_dim, "attention_out", config.attention_bias == "all", residual_init)(seen)
        entered, h = h, h + after("attention_out_norm", attended)
        x = _norm(config, "mlp_norm")(entered if config.parallel_residual else h)
        hidden = dense(config.mlp_size, "mlp_in", config.mlp_bias)(x)
        hidden = _activated(config, hidden, lambda: dense(config.mlp_size, "mlp_gate", config.mlp_bias)(x))
        out = dense(config.embed_dim, "mlp_out", config.mlp_bias, residual_init)(hidden)
        h = constrain_activations(h + after("mlp_out_norm", out))
        return h, live


class Backbone(nn.Module):
    """f_θ. `radius` is R, `max_tail_length` K_max; `stacked`: the blocks' parameters are stacked (`unstack_blocks`).

    `in_front`: this is a language model with a tail in front of it. Adapters, conditioning (slot_maturity, slot_film)
    and a head of their own (slot_head) act at slots alone, which are the positions whose maturity is below 1; all
    others compute what the language model does.
    """

    config: ModelConfig
    adapter: AdapterConfig
    compute: ComputeConfig
    max_positions: int
    max_tail_length: int
    radius: float
    stacked: bool
    in_front: bool

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        maturity: jax.Array,
        tail_length: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None = None,
        history: KVCache | StackedCache | None = None,
        num_visible: jax.Array | None = None,
        dropout: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | StackedCache]:
        """Predictions for the positions after those given.

        Args:
          z: vectors [B, T, d] on the scale of R.
          maturity: α [B, T] in [0, 1], 1 = committed.
          tail_length: K [B], or per position [B, T]; 0 = no tail.
          positions: absolute positions [B, T], below `max_positions`.
          mask: which of the T positions the last Q see, [B or 1, Q, T] bool; the others are causal, as are all if None.
          history: keys and values of earlier positions, stacked exactly if the blocks are. Its rows may be shared by M
            rows of `z`: row b reads row b // M.
          num_visible: how many positions of the history may be read, from the first on, [B].
          dropout: keys [L, B] for the dropout of an adapter; None drops nothing.

        Returns:
          vectors [B, T, d], index t predicting position `positions[:, t]` + 1, in float32; and the keys and
          values of the T positions, stacked if the blocks are.
        """
        config, size, gate, own = self.config, self.config.embed_dim, None, (maturity, tail_length)
        told = self.max_tail_length
        if self.in_front:  # the language model itself is told maturity 1 and K = 0 everywhere
            gate, told = (maturity < 1.0)[..., None], 0
            maturity, tail_length = jnp.ones_like(maturity), jnp.zeros_like(tail_length)
        h = z.astype(config.dtype) * (config.input_norm / self.radius)
        if config.positions == "learned":
            position_init = nn.initializers.normal(0.5 * config.input_norm / math.sqrt(size))
            h += nn.Embed(self.max_positions, size, dtype=config.dtype, embedding_init=position_init,
                          name="position")(positions)
        h += MaturityConditioning(config, name="maturity")(maturity)
        if config.film == "once":
            h = TailLengthFilm(config, told, name="film")(h, tail_length)
        if gate is not None:
            conditioned = h + MaturityConditioning(config, name="slot_maturity")(own[0])
            h = jnp.where(gate, TailLengthFilm(config, self.max_tail_length, name="slot_film")(conditioned, own[1]), h)
        h = constrain_activations(h)
        rest, facts = (gate, tail_length, positions, mask, num_visible), _layer_facts(config)
        if self.stacked:
            blocks = nn.scan(
                _rematerialised(self.compute),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, 0, *(nn.broadcast,) * 5),  # pyright: ignore[reportArgumentType]
                length=config.num_layers,
            )
            h, live = blocks(config, self.adapter, self.compute, told, name="blocks")(
                h, history, dropout, facts, *rest)
        else:
            assert not isinstance(history, LayerCache)
            live = ()
            for layer in range(config.num_layers):
                block = Block(config, self.adapter, self.compute, told, name=f"block_{layer}")
                own_history, keys = (None if x is None else x[layer] for x in (history, dropout))
                h, own = block(h, own_history, keys, jax.tree.map(lambda x, at=layer: x[at], facts), *rest)
                live += (own,)
        h = _norm(config, "final_norm")(h)
        # The norm's output has length √d, so this spread gives ‖ẑ‖ ≈ head_init · R.
        head_init = nn.initializers.normal(config.head_init * self.radius / size)

        def head(name):
            return nn.Dense(size, use_bias=False, dtype=jnp.float32, kernel_init=head_init, name=name)(h)

        prediction = h.astype(jnp.float32) if config.head == "identity" else head("head")
        return (prediction if gate is None else jnp.where(gate, head("slot_head"), prediction)), live


def _rematerialised(compute: ComputeConfig) -> type[Block]:
    """Block with the backward pass that `compute.remat` asks for."""
    match compute.remat:
        case "none":
            return Block
        case "products":
            policy = jax.checkpoint_policies.dots_saveable
        case "blocks":
            policy = jax.checkpoint_policies.nothing_saveable
    # Inside a scan nothing can be merged with the forward pass anyway.
    return nn.remat(Block, policy=policy, prevent_cse=False)


def unstack_blocks(params: Params) -> Params:
    """The backbone's `params` with separate blocks (`block_0`, …), for decoding; unstacked ones are returned
    unchanged."""
    if "blocks" not in params:
        return params
    stack = params["blocks"]
    count = jax.tree.leaves(stack)[0].shape[0]
    own = {f"block_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], stack) for layer in range(count)}
    return {name: value for name, value in params.items() if name != "blocks"} | own


def layers_of(live: KVCache | StackedCache) -> KVCache:
    """`live` with one LayerCache per layer; one that is not stacked is returned unchanged."""
    if not isinstance(live, LayerCache):
        return live
    return tuple(jax.tree.map(lambda x, layer=layer: x[layer], live) for layer in range(live.key.shape[0]))


def conditioning_of_committed(params: Params, config: Config, tail_length: int) -> tuple[jax.Array, jax.Array]:
    """Effect of maturity 1 and K = `tail_length` on the input h of a backbone with `film="once"`: a ⊙ h + b.

    `params` are the backbone's. Returns a and b [d].
    """
    size = config.model.embed_dim
    film = params["film"]["embed"]["embedding"][min(tail_length, config.maturation.max_tail_length)]
    scale = 1.0 + film[:size]
    return scale, scale * maturity_of_committed(params, config) + film[size:]


def maturity_of_committed(params: Params, config: Config) -> jax.Array:
    """The vector [d] that maturity 1 adds to the input; `params` are the backbone's."""
    added = MaturityConditioning(config.model).apply({"params": params["maturity"]}, jnp.ones((1, 1)))
    return jnp.reshape(jnp.asarray(added, jnp.float32), (config.model.embed_dim,))


def make_backbone(config: Config, stacked: bool = True) -> Backbone:
    """The backbone that `config` describes; parameters are only initialised `stacked`."""
    return Backbone(config.model, config.adapter, config.compute, config.max_positions,
                    config.maturation.max_tail_length, config.table.radius, stacked, config.objective.kind == "tail")


def make_forward(config: Config) -> Forward:
    """f(params, z, maturity, tail_length, positions, …) of `Backbone.__call__`, as a pure function.

    The blocks of `params` may be stacked; if there is a history of separate layers they are unstacked here.
    """

    def forward(
        params: Params, *args, history: KVCache | StackedCache | None = None, **kwargs
    ) -> tuple[jax.Array, Any]:
        params = unstack_blocks(params) if isinstance(history, tuple) else params
        backbone = make_backbone(config, stacked="blocks" in params)
        return backbone.apply({"params": params}, *args, history=history, **kwargs)  # pyright: ignore[reportReturnType]

    return forward
