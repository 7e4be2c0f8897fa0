"""A checkpoint of a tiny Llama, written by hand."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from transformers import PreTrainedTokenizerFast

from tokmat_jax.data.tokenizer import train_bpe

CONFIG = {
    "model_type": "llama", "vocab_size": 280, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 0,
}
TABLE, QUERY, DOWN = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", \
    "model.layers.0.mlp.down_proj.weight"
SHAPES = {
    TABLE: (280, 8), "model.norm.weight": (8,), "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,), QUERY: (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8), "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8), "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8), DOWN: (8, 12),
}
SINGLE = "model.safetensors"


def weights() -> dict[str, np.ndarray]:
    """Random weights; the rows of the table have lengths of their own."""
    rng = np.random.default_rng(0)
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return found | {TABLE: found[TABLE] * rng.uniform(0.3, 2.0, (280, 1)).astype(np.float32)}


def configure(folder: Path, **fields) -> None:
    """Writes config.json, in which `fields` differ."""
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))


def store(folder: Path, **changed: np.ndarray | None) -> None:
    """Writes the weights, of which `changed` differ; those that are None are left out."""
    found = weights() | changed
    safetensors.numpy.save_file({name: array for name, array in found.items() if array is not None}, folder / SINGLE)


def write(folder: Path) -> Path:
    """The whole checkpoint, without fault."""
    configure(folder)
    store(folder)
    tokenizer = train_bpe(["the cat sat on the mat"], 270)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder
