"""The families of checkpoints: which stored weight is which parameter, and which settings describe the model.

One table per family serves both directions. Names are those of the language models of `transformers`. Shapes are not
listed; they follow from the parameters that the config asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.config import Config, ModelConfig, RopeConfig
from tokmat_jax.errors import UserError, shown

MODEL_TYPES = ("gpt2", "llama", "qwen2")
"""Supported values of `model_type` in a config.json."""

LISTED = ("num_hidden_layers", "n_layer", "num_labels")
"""Numbers in a config.json from which `transformers` makes lists of that length."""
_LONGEST_LIST = 1 << 12


def check_count(found: Any, field: str, where: Path) -> None:
    """Raises UserError if a `field` of `LISTED` is so large that its list would take too much memory."""
    if isinstance(found, int | float) and found > _LONGEST_LIST:
        raise UserError(f"{where}: {field} = {shown(found)} is not supported; it must be at most {_LONGEST_LIST}")


@dataclass(frozen=True)
class Weight:
    """One stored weight."""

    name: str
    """As stored; `{layer}` stands for the number of the block."""
    paths: tuple[str, ...]
    """Our parameters; several are concatenated along the stored weight's last axis."""
    transposed: bool = False
    """Whether a matrix is stored as [out, in]; ours are [in, out]."""

    @property
    def per_layer(self) -> bool:
        """Whether every block has one; ours are then stacked, [L, …]."""
        return "{layer}" in self.name


def _norm(name: str, path: str, config: ModelConfig) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (f"{path}/scale",))
    if config.norm == "layer":
        yield Weight(f"{name}.bias", (f"{path}/bias",))


def _gpt2(config: ModelConfig, tied: bool) -> Iterator[Weight]:
    block, ours = "transformer.h.{layer}", "backbone/blocks"
    yield Weight("transformer.wte.weight", ("table",))
    yield Weight("transformer.wpe.weight", ("backbone/position/embedding",))
    yield from _norm(f"{block}.ln_1", f"{ours}/attention_norm", config)
    yield from _norm(f"{block}.ln_2", f"{ours}/mlp_norm", config)
    matrices = {"attn.c_attn": ("query", "key", "value"), "attn.c_proj": ("attention_out",),
                "mlp.c_fc": ("mlp_in",), "mlp.c_proj": ("mlp_out",)}
    for name, parts in matrices.items():
        yield Weight(f"{block}.{name}.weight", tuple(f"{ours}/{part}/kernel" for part in parts))
        yield Weight(f"{block}.{name}.bias", tuple(f"{ours}/{part}/bias" for part in parts))
    yield from _norm("transformer.ln_f", "backbone/final_norm", config)
    if not tied:
        yield Weight("lm_head.weight", ("readout",))


def _llama(config: ModelConfig, tied: bool) -> Iterator[Weight]:
    block, ours = "model.layers.{layer}", "backbone/blocks"
    yield Weight("model.embed_tokens.weight", ("table",))
    yield from _norm(f"{block}.input_layernorm", f"{ours}/attention_norm", config)
    yield from _norm(f"{block}.post_attention_layernorm", f"{ours}/mlp_norm", config)
    qkv, out = config.attention_bias != "none", config.attention_bias == "all"
    matrices = {"self_attn.q_proj": ("query", qkv), "self_attn.k_proj": ("key", qkv),
                "self_attn.v_proj": ("value", qkv),
                "self_attn.o_proj": ("attention_out", out), "mlp.gate_proj": ("mlp_gate", config.mlp_bias),
                "mlp.up_proj": ("mlp_in", config.mlp_bias), "mlp.down_proj": ("mlp_out", config.mlp_bias)}
    for name, (part, bias) in matrices.items():
        yield Weight(f"{block}.{name}.weight", (f"{ours}/{part}/kernel",), transposed=True)
        if bias:
            yield Weight(f"{block}.{name}.bias", (f"{ours}/{part}/bias",))
    yield from _norm("model.norm", "backbone/final_norm", config)
    if not tied:
        yield Weight("lm_head.weight", ("readout",))


def weights(model_type: str, config: ModelConfig, tied: bool) -> list[Weight]:
    """The weights of a checkpoint of `model_type`, with a separate output table unless `tied`."""
    return list((_gpt2 if model_type == "gpt2" else _llama)(config, tied))


PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model."}
"""Prefix of the names of all weights except `lm_head`; files of a bare backbone omit it."""

CONSTANTS = (r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
"""Names of constants that some files hold; they are not weights."""


def stored_shape(weight: Weight, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one layer's stored `weight` from the `shapes` of our parameters by path."""
    parts = [shapes[path][1:] if weight.per_layer else shapes[path] for path in weight.paths]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    return shape[::-1] if weight.transposed else shape


def put(weight: Weight, layer: int, stored: np.ndarray, params: dict[str, np.ndarray]) -> None:
    """Writes a `stored` weight of one layer into `params` by path."""
    array, begin = stored.T if weight.transposed else stored, 0
    for path in weight.paths:
        target = params[path][layer] if weight.per_layer else params[path]
        end = begin + target.shape[-1]
        target[...] = array[..., begin:end]
        begin = end


def get(weight: Weight, layer: int, params: dict[str, np.ndarray]) -> np.ndarray:
    """The stored form of one layer's `weight`: what `put` would read."""
    parts = [np.asarray(params[path][layer] if weight.per_layer else params[path]) for path in weight.paths]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(array.T if weight.transposed else array)


def _require(condition: bool, field: str, found: Any, wanted: str) -> None:
    if not condition:
        raise UserError(f"config.json: {field} = {shown(found)} is not supported; it must be {wanted}")


def read_settings(stored: Any) -> tuple[ModelConfig, bool]:
    """Our settings, and whether the head is tied, from a config object of `transformers`.

    Raises UserError for a setting that the backbone cannot express.
    """
    if getattr(stored, "quantization_config", None):
        raise UserError("config.json: the weights are quantised (quantization_config); save them dequantised first")
    if stored.model_type == "gpt2":
        _require(stored.activation_function in ("gelu_new", "gelu_pytorch_tanh"), "activation_function",
                 stored.activation_function, "gelu_new")
        _require(stored.scale_attn_weights, "scale_attn_weights", stored.scale_attn_weights, "true")
        _require(not stored.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx",
                 stored.scale_attn_by_inverse_layer_idx, "false")
        _require(not stored.add_cross_attention, "add_cross_attention", stored.add_cross_attention, "false")
        model = ModelConfig(
            embed_dim=stored.n_embd, num_layers=stored.n_layer, num_heads=stored.n_head, mlp_dim=stored.n_inner,
            norm_epsilon=stored.layer_norm_epsilon, max_positions=stored.n_positions, head="identity",
        )
        return model, bool(stored.tie_word_embeddings)
    _require(stored.hidden_act == "silu", "hidden_act", stored.hidden_act, "silu")
    windowed = getattr(stored, "use_sliding_window", False)
    _require(not windowed, "use_sliding_window", windowed, "false")
    qwen = stored.model_type == "qwen2"
    head_dim = getattr(stored, "head_dim", None)
    model = ModelConfig(
        embed_dim=stored.hidden_size, num_layers=stored.num_hidden_layers, num_heads=stored.num_attention_heads,
        num_kv_heads=stored.num_key_value_heads, head_dim=head_dim, mlp="swiglu", mlp_dim=stored.intermediate_size,
        attention_bias="qkv" if qwen else "all" if stored.attention_bias else "none",
        mlp_bias=False if qwen else bool(stored.mlp_bias), norm="rms", norm_epsilon=stored.rms_norm_eps,
        positions="rotary", rope=_read_rope(stored.rope_parameters, stored.max_position_embeddings),
        max_positions=stored.max_position_embeddings, head="identity",
    )
    return model, bool(stored.tie_word_embeddings)


def _read_rope(stored: dict[str, Any], max_positions: int) -> RopeConfig:
    kind = stored.get("rope_type", "default")
    known = ("default", "linear", "dynamic", "llama3", "yarn")
    _require(kind in known, "rope_parameters.rope_type", kind, f"one of {', '.join(known)}")
    partial = stored.get("partial_rotary_factor", 1.0)
    _require(partial == 1.0, "rope_parameters.partial_rotary_factor", partial, "1")
    original = stored.get("original_max_position_embeddings") or max_positions
    factor = stored.get("factor")
    if factor is None:
        factor = max_positions / original if kind == "yarn" else 1.0
    rope = RopeConfig(theta=float(stored["rope_theta"]), scaling="none" if kind == "default" else kind,
                      factor=float(factor), original_positions=int(original))
    if kind == "llama3":
        return replace(rope, low_freq_factor=float(stored["low_freq_factor"]),
                       high_freq_factor=float(stored["high_freq_factor"]))
    if kind == "yarn":
        return replace(rope, beta_fast=float(stored.get("beta_fast") or 32),
                       beta_slow=float(stored.get("beta_slow") or 1), truncate=bool(stored.get("truncate", True)),
                       attention_factor=_attention_factor(stored, factor))
    return rope


def _attention_factor(stored: dict[str, Any], factor: float) -> float:
    """YaRN's attention factor: as stored, or 0.1 · mscale · ln(factor) + 1 (Peng et al. 2023, §3.4)."""
    if stored.get("attention_factor") is not None:
        return float(stored["attention_factor"])

    def length(mscale):
        return 1.0 if factor <= 1 else 0.1 * mscale * float(np.log(factor)) + 1.0

    if stored.get("mscale") and stored.get("mscale_all_dim"):
        return length(stored["mscale"]) / length(stored["mscale_all_dim"])
    return length(1.0)


def model_type_of(config: ModelConfig) -> str:
    """The family that has all parts of `config`; raises UserError if no family has them."""
    heads = config.head_size * config.num_heads == config.embed_dim and config.kv_heads == config.num_heads
    if (config.positions, config.norm, config.mlp) == ("learned", "layer", "gelu"):
        if config.attention_bias == "all" and config.mlp_bias and heads:
            return "gpt2"
    elif (config.positions, config.norm, config.mlp) == ("rotary", "rms", "swiglu"):
        if config.attention_bias != "qkv":
            return "llama"
        if not config.mlp_bias:
            return "qwen2"
    raise UserError("no family of checkpoints has this model's parts: GPT-2 has learned positions, LayerNorm, GELU and "
                    "every bias; Llama has rotary positions, RMSNorm, SwiGLU and biases in all of attention or none, "
                    "Qwen2 in queries, keys and values alone")


def write_settings(model_type: str, config: Config, vocab_size: int, tied: bool, dtype: str) -> dict[str, Any]:
    """Fields of the family's config in `transformers` for a model with `config` and V = `vocab_size`."""
    model = config.model
    shared = {"vocab_size": vocab_size, "tie_word_embeddings": tied, "dtype": dtype}
    if model_type == "gpt2":
        return shared | {
            "n_embd": model.embed_dim, "n_layer": model.num_layers, "n_head": model.num_heads,
            "n_inner": model.mlp_dim, "n_positions": config.max_positions, "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": "gelu_new",
        }
    fields = shared | {
        "hidden_size": model.embed_dim, "intermediate_size": model.mlp_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_size,
        "hidden_act": "silu", "rms_norm_eps": model.norm_epsilon, "max_position_embeddings": config.max_positions,
        "rope_parameters": _write_rope(model.rope),
    }
    if model_type == "llama":
        fields |= {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}
    return fields


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    kind = "default" if rope.scaling == "none" else rope.scaling
    stored: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": kind}
    if rope.scaling != "none":
        stored["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        stored["original_max_position_embeddings"] = rope.original_positions
    if rope.scaling == "llama3":
        stored |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        stored |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate,
                   "attention_factor": rope.attention_factor}
    return stored
