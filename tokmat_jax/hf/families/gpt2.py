"""GPT-2: learned positions, LayerNorm, GELU, biases everywhere, matrices stored as [in, out]."""

from collections.abc import Iterator
from typing import Any

from tokmat_jax.config import ModelConfig
from tokmat_jax.hf.families.family import Family, require
from tokmat_jax.hf.families.weight import BLOCKS, Weight, matrix, norm

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def _weights(config: ModelConfig) -> Iterator[Weight]:
    block = "transformer.h.{layer}"
    yield Weight("transformer.wte.weight", ("table",))
    yield Weight("transformer.wpe.weight", ("backbone/position/embedding",))
    yield from norm(f"{block}.ln_1", f"{BLOCKS}/attention_norm", config)
    yield from norm(f"{block}.ln_2", f"{BLOCKS}/mlp_norm", config)
    for name, parts in (("attn.c_attn", ("query", "key", "value")), ("attn.c_proj", ("attention_out",)),
                        ("mlp.c_fc", ("mlp_in",)), ("mlp.c_proj", ("mlp_out",))):
        yield from matrix(f"{block}.{name}", parts, bias=True, transposed=False)
    yield from norm("transformer.ln_f", "backbone/final_norm", config)


def _read(stored: Any) -> ModelConfig:
    require(stored.activation_function in _ACTIVATIONS, "activation_function", stored.activation_function,
            f"one of {', '.join(_ACTIVATIONS)}")
    require(stored.scale_attn_weights, "scale_attn_weights", stored.scale_attn_weights, "true")
    require(not stored.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx",
            stored.scale_attn_by_inverse_layer_idx, "false")
    require(not stored.add_cross_attention, "add_cross_attention", stored.add_cross_attention, "false")
    return ModelConfig(
        embed_dim=stored.n_embd, num_layers=stored.n_layer, num_heads=stored.n_head, mlp_dim=stored.n_inner,
        mlp=_ACTIVATIONS[stored.activation_function],  # pyright: ignore[reportArgumentType]
        norm_epsilon=stored.layer_norm_epsilon, max_positions=stored.n_positions, head="identity",
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.embed_dim, "n_layer": model.num_layers, "n_head": model.num_heads, "n_inner": model.mlp_dim,
        "n_positions": model.max_positions, "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu" if model.mlp == "gelu_exact" else "gelu_new",
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", "transformer.", _weights, _read, _write)
