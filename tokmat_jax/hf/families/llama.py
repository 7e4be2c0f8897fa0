"""Llama and its kin: rotary positions, RMSNorm, SwiGLU, grouped heads.

Mistral has windows, Qwen2 biases in queries, keys and values alone, Qwen3 norms of queries and keys.
"""

from collections.abc import Iterator
from typing import Any

from tokmat_jax.config import ModelConfig
from tokmat_jax.hf.families.family import Family, layer_types, require, windows
from tokmat_jax.hf.families.rope import read_rope, write_rope
from tokmat_jax.hf.families.weight import BLOCKS, Weight, matrix, norm


def blocks(config: ModelConfig) -> Iterator[Weight]:
    """The matrices of a block and its norms of queries and keys, as all who write `self_attn` and `mlp` name them."""
    block, qkv, out = "model.layers.{layer}", config.attention_bias != "none", config.attention_bias == "all"
    for name, part, bias in (
        ("self_attn.q_proj", "query", qkv), ("self_attn.k_proj", "key", qkv), ("self_attn.v_proj", "value", qkv),
        ("self_attn.o_proj", "attention_out", out), ("mlp.gate_proj", "mlp_gate", config.mlp_bias),
        ("mlp.up_proj", "mlp_in", config.mlp_bias), ("mlp.down_proj", "mlp_out", config.mlp_bias),
    ):
        yield from matrix(f"{block}.{name}", (part,), bias)
    if config.query_key_norm:
        yield from norm(f"{block}.self_attn.q_norm", f"{BLOCKS}/query_norm", config)
        yield from norm(f"{block}.self_attn.k_norm", f"{BLOCKS}/key_norm", config)


def _weights(config: ModelConfig) -> Iterator[Weight]:
    yield Weight("model.embed_tokens.weight", ("table",))
    yield from norm("model.layers.{layer}.input_layernorm", f"{BLOCKS}/attention_norm", config)
    yield from norm("model.layers.{layer}.post_attention_layernorm", f"{BLOCKS}/mlp_norm", config)
    yield from blocks(config)
    yield from norm("model.norm", "backbone/final_norm", config)


def _plain(stored: Any, **parts: Any) -> ModelConfig:
    """The settings that all of them have, and the family's own `parts`."""
    require(stored.hidden_act == "silu", "hidden_act", stored.hidden_act, "silu")
    return ModelConfig(
        embed_dim=stored.hidden_size, num_layers=stored.num_hidden_layers, num_heads=stored.num_attention_heads,
        num_kv_heads=stored.num_key_value_heads, head_dim=getattr(stored, "head_dim", None), mlp="swiglu",
        mlp_dim=stored.intermediate_size, norm="rms", norm_epsilon=stored.rms_norm_eps, positions="rotary",
        rope=read_rope(stored.rope_parameters, stored.max_position_embeddings),
        max_positions=stored.max_position_embeddings, head="identity",
        **({"attention_bias": "none", "mlp_bias": False} | parts),
    )


def shape(model: ModelConfig) -> dict[str, Any]:
    """The fields of sizes that all of them have."""
    return {
        "hidden_size": model.embed_dim, "intermediate_size": model.mlp_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_size,
        "rms_norm_eps": model.norm_epsilon, "max_position_embeddings": model.max_positions,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return shape(model) | {"hidden_act": "silu", "rope_parameters": write_rope(model.rope)}


def _biased(stored: Any) -> str:
    return "all" if stored.attention_bias else "none"


def _read_llama(stored: Any) -> ModelConfig:
    return _plain(stored, attention_bias=_biased(stored), mlp_bias=bool(stored.mlp_bias))


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return _write(model) | {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}


def _read_qwen3(stored: Any) -> ModelConfig:
    return _plain(stored, attention_bias=_biased(stored), query_key_norm=True, **windows(stored))


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
    return _write(model) | {
        "use_sliding_window": bool(model.windowed_layers), "sliding_window": model.attention_window,
        "layer_types": layer_types(model), "attention_bias": model.attention_bias == "all"}


LLAMA = Family("llama", "LlamaForCausalLM", "model.", _weights, _read_llama, _write_llama)
MISTRAL = Family("mistral", "MistralForCausalLM", "model.", _weights, lambda stored: _plain(stored, **windows(stored)),
                 lambda model: _write(model) | {"sliding_window": model.attention_window})
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "model.", _weights,
               lambda stored: _plain(stored, attention_bias="qkv", **windows(stored)), _write_qwen)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "model.", _weights, _read_qwen3, _write_qwen)
