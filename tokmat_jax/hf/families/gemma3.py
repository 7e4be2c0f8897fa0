"""Gemma 3 (text): norms around attention and MLP whose factors are 1 + weight, norms of queries and keys, GeGLU, input
rows times √d, and windows in most layers, which have a rotary base of their own."""

import math
from collections.abc import Iterator
from typing import Any

from tokmat_jax.config import ModelConfig
from tokmat_jax.hf.families.family import Family, layer_types, require, windows
from tokmat_jax.hf.families.llama import blocks, shape
from tokmat_jax.hf.families.rope import read_rope, write_rope
from tokmat_jax.hf.families.weight import BLOCKS, Weight, norm

_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "attention_out_norm",
          "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_out_norm"}


def _weights(config: ModelConfig) -> Iterator[Weight]:
    yield Weight("model.embed_tokens.weight", ("table",))
    for name, path in _NORMS.items():
        yield from norm(f"model.layers.{{layer}}.{name}", f"{BLOCKS}/{path}", config)
    yield from blocks(config)
    yield from norm("model.norm", "backbone/final_norm", config)


def _read(stored: Any) -> ModelConfig:
    for field in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        require(not getattr(stored, field, None), field, getattr(stored, field, None), "null")
    require(stored.hidden_activation == "gelu_pytorch_tanh", "hidden_activation", stored.hidden_activation,
            "gelu_pytorch_tanh")
    window, near = windows(stored), stored.rope_parameters["sliding_attention"]
    require(near.get("rope_type", "default") == "default", "rope_parameters.sliding_attention.rope_type",
            near.get("rope_type"), "default")
    full = stored.rope_parameters["full_attention"] | ({"window_theta": near["rope_theta"]} if window else {})
    return ModelConfig(
        embed_dim=stored.hidden_size, num_layers=stored.num_hidden_layers, num_heads=stored.num_attention_heads,
        num_kv_heads=stored.num_key_value_heads, head_dim=stored.head_dim, mlp="geglu",
        mlp_dim=stored.intermediate_size, mlp_bias=False, attention_bias="all" if stored.attention_bias else "none",
        query_key_norm=True, attention_scale=stored.query_pre_attn_scalar**-0.5, norm="rms_plus_one",
        norm_placement="around", norm_epsilon=stored.rms_norm_eps, positions="rotary",
        rope=read_rope(full, stored.max_position_embeddings), max_positions=stored.max_position_embeddings,
        input_norm=math.sqrt(stored.hidden_size), head="identity", **window,
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    full = write_rope(model.rope)
    near = {"rope_type": "default", "rope_theta": full.pop("window_theta", model.rope.theta)}
    scale = model.head_size**-0.5 if model.attention_scale is None else model.attention_scale
    return shape(model) | {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": model.attention_bias == "all",
        "query_pre_attn_scalar": round(scale**-2), "sliding_window": model.attention_window,
        "layer_types": layer_types(model), "rope_parameters": {"full_attention": full, "sliding_attention": near}}


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", "model.", _weights, _read, _write)
