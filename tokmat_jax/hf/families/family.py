"""What a family of checkpoints is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokmat_jax.config import ModelConfig
from tokmat_jax.errors import UserError, shown
from tokmat_jax.hf.families.weight import Weight

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """The checkpoints of one `model_type` of `transformers`."""

    model_type: str
    architecture: str
    """Name of its language model class."""
    prefix: str
    """Prefix of the names of all weights except the head; files of a bare backbone omit it."""
    weights: Callable[[ModelConfig], Iterator[Weight]]
    """Its weights without the head; the first is the table."""
    read: Callable[[Any], ModelConfig]
    """Our settings from a config object of `transformers`; raises UserError for what the backbone cannot express.
    `input_norm` is the factor of the input rows."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Fields of the config object for a model; `max_positions` is set. What the family cannot express is left out."""
    head: str = HEAD
    """Name of the output table."""


def require(condition: bool, field: str, found: Any, wanted: str) -> None:
    """Raises UserError unless the `field` of a config.json is as `wanted`."""
    if not condition:
        raise UserError(f"config.json: {field} = {shown(found)} is not supported; it must be {wanted}")


def windows(stored: Any) -> dict[str, Any]:
    """The settings of layers that see a window alone."""
    window, count = getattr(stored, "sliding_window", None), stored.num_hidden_layers
    types = getattr(stored, "layer_types", None) or ["sliding_attention"] * count
    layers = tuple(layer for layer, kind in enumerate(types[:count]) if kind == "sliding_attention")
    if window is None or not layers:
        return {}
    return {"attention_window": int(window), "windowed_layers": layers}


def layer_types(model: ModelConfig) -> list[str]:
    """`layer_types` of a config object."""
    return ["sliding_attention" if layer in model.windowed_layers else "full_attention"
            for layer in range(model.num_layers)]
