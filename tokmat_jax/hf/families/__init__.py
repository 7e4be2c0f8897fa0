"""The families of checkpoints: which stored weight is which parameter, and which settings describe the model.

One module per family serves both directions. Names are those of the language models of `transformers`. Shapes are not
listed; they follow from the parameters that the config asks for.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from tokmat_jax.config import Config, ModelConfig, RopeConfig
from tokmat_jax.errors import ConfigError, UserError, shown
from tokmat_jax.hf.families.family import HEAD, Family
from tokmat_jax.hf.families.gemma3 import GEMMA3
from tokmat_jax.hf.families.gpt2 import GPT2
from tokmat_jax.hf.families.gpt_neox import GPT_NEOX
from tokmat_jax.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from tokmat_jax.hf.families.rope import essential
from tokmat_jax.hf.families.weight import Weight, get, put, stored_shape
from tokmat_jax.output import without_torch_notice

__all__ = ["FAMILIES", "HEAD", "LISTED", "Weight", "check_count", "family_of", "get",
           "input_factor", "is_constant", "put", "read_settings",
           "stored_shape", "weights", "write_settings"]

FAMILIES = {one.model_type: one for one in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GPT_NEOX)}
"""By `model_type` of a config.json; an exported model gets the first that has its parts."""

LISTED = ("num_hidden_layers", "n_layer", "num_labels")
"""Numbers in a config.json from which `transformers` makes lists of that length."""
_LONGEST_LIST = 1 << 12

_CONSTANTS = (r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
"""Names of constants that some files hold; they are not weights."""


def is_constant(name: str) -> bool:
    """Whether the stored weight `name` is a constant."""
    return any(re.search(pattern, name) for pattern in _CONSTANTS)


def check_count(found: Any, field: str, where: Path) -> None:
    """Raises UserError if a `field` of `LISTED` is so large that its list would take too much memory."""
    if isinstance(found, int | float) and found > _LONGEST_LIST:
        raise UserError(f"{where}: {field} = {shown(found)} is not supported; it must be at most {_LONGEST_LIST}")


def weights(model_type: str, config: ModelConfig, tied: bool) -> list[Weight]:
    """The weights of a checkpoint of `model_type`, with a separate output table unless `tied`."""
    head = [] if tied else [Weight(FAMILIES[model_type].head, ("readout",))]
    return [*FAMILIES[model_type].weights(config), *head]


def read_settings(stored: Any) -> tuple[ModelConfig, bool]:
    """Our settings, and whether the head is tied, from a config object of `transformers`.

    `input_norm` of the settings is the factor of the input rows. Raises UserError for a setting that the backbone
    cannot express.
    """
    if getattr(stored, "quantization_config", None):
        raise UserError("config.json: the weights are quantised (quantization_config); save them dequantised first")
    return FAMILIES[stored.model_type].read(stored), bool(stored.tie_word_embeddings)


def write_settings(family: Family, config: Config) -> Any:
    """The config object of `transformers` for a model with `config`."""
    with without_torch_notice():
        from transformers import CONFIG_MAPPING

    model = dataclasses.replace(config.model, max_positions=config.max_positions)
    return CONFIG_MAPPING[family.model_type](**family.write(model))


def family_of(config: Config, preferred: str | None = None) -> Family:
    """The family that has all parts of the model: the one whose settings are still these after it has written and read
    them. `preferred` is tried first. Raises UserError if no family has them."""
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    for family in order:
        try:
            if _parts(family.read(write_settings(family, config))) == _parts(config.model):
                return family
        except (UserError, ConfigError, TypeError, ValueError):  # it cannot even write them
            continue
    raise UserError(f"no family of checkpoints has this model's parts; there are {', '.join(FAMILIES)}, and "
                    f"docs/hugging-face.md lists the parts of each")


def input_factor(family: Family, config: Config) -> float:
    """The factor by which a model of `family` scales its input rows."""
    return family.read(write_settings(family, config)).input_norm


def _parts(model: ModelConfig) -> ModelConfig:
    """`model` as two models of the same parts agree on it."""
    rope = essential(model.rope) if model.positions == "rotary" else RopeConfig()
    scale = model.head_size**-0.5 if model.attention_scale is None else model.attention_scale
    return dataclasses.replace(
        model, num_kv_heads=model.kv_heads, head_dim=model.head_size, mlp_dim=model.mlp_size, max_positions=None,
        attention_scale=round(scale, 9), rope=rope, film="once", input_norm=1.0, head="identity", head_init=0.5,
        dtype="float32")
