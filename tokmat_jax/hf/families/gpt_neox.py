"""GPT-NeoX and Pythia: attention and MLP read the same input, a part of each head is rotated, GELU, LayerNorm, biases;
each head's query, key and value are stored side by side."""

from collections.abc import Iterator
from typing import Any

from tokmat_jax.config import ModelConfig
from tokmat_jax.hf.families.family import Family, require
from tokmat_jax.hf.families.rope import read_rope, write_rope
from tokmat_jax.hf.families.weight import BLOCKS, Weight, matrix, norm

_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def _weights(config: ModelConfig) -> Iterator[Weight]:
    block = "gpt_neox.layers.{layer}"
    yield Weight("gpt_neox.embed_in.weight", ("table",))
    yield from norm(f"{block}.input_layernorm", f"{BLOCKS}/attention_norm", config)
    yield from norm(f"{block}.post_attention_layernorm", f"{BLOCKS}/mlp_norm", config)
    bias = config.attention_bias == "all"
    yield from matrix(f"{block}.attention.query_key_value", ("query", "key", "value"), bias, by_head=config.num_heads)
    yield from matrix(f"{block}.attention.dense", ("attention_out",), bias)
    yield from matrix(f"{block}.mlp.dense_h_to_4h", ("mlp_in",), bias=True)
    yield from matrix(f"{block}.mlp.dense_4h_to_h", ("mlp_out",), bias=True)
    yield from norm("gpt_neox.final_layer_norm", "backbone/final_norm", config)


def _read(stored: Any) -> ModelConfig:
    require(stored.hidden_act in _ACTIVATIONS, "hidden_act", stored.hidden_act, f"one of {', '.join(_ACTIVATIONS)}")
    return ModelConfig(
        embed_dim=stored.hidden_size, num_layers=stored.num_hidden_layers, num_heads=stored.num_attention_heads,
        attention_bias="all" if stored.attention_bias else "none", mlp_dim=stored.intermediate_size,
        mlp=_ACTIVATIONS[stored.hidden_act],  # pyright: ignore[reportArgumentType]
        parallel_residual=bool(stored.use_parallel_residual), norm_epsilon=stored.layer_norm_eps, positions="rotary",
        rope=read_rope(stored.rope_parameters, stored.max_position_embeddings),
        max_positions=stored.max_position_embeddings, head="identity",
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.embed_dim, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_size, "hidden_act": "gelu" if model.mlp == "gelu_exact" else "gelu_new",
        "layer_norm_eps": model.norm_epsilon, "max_position_embeddings": model.max_positions,
        "use_parallel_residual": model.parallel_residual, "attention_bias": model.attention_bias == "all",
        "rope_parameters": {"partial_rotary_factor": 1.0} | write_rope(model.rope)}


GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", _weights, _read, _write,
                  head="embed_out.weight")
