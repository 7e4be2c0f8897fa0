"""Rotary positions: pair i of a head's coordinates turns by position · frequency_i (Su et al. 2021, arXiv:2104.09864).

Pair i consists of coordinates i and i + D/2; only the first coordinates of a head may be rotated, D is then their
number. Frequencies for longer contexts are those of linear interpolation (Chen et al. 2023, arXiv:2306.15595), of
Llama 3.1's configuration, and of YaRN (Peng et al. 2023, arXiv:2309.00071). Each slows down the pairs that turn less
often in the original context than a bound.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import ModelConfig, RopeConfig
from tokmat_jax.errors import ConfigError

_LARGEST_HEAD = 1 << 14
"""Limit on D: frequencies are computed before weights are checked, so a foreign config must not make them huge."""


def frequencies(config: RopeConfig, head_size: int) -> np.ndarray:
    """Radians per position of each pair [D/2], float32; raises ConfigError for a head larger than any in use."""
    if head_size > _LARGEST_HEAD:
        raise ConfigError(f"heads of width {head_size} are not supported with rotary positions; the maximum is "
                          f"{_LARGEST_HEAD}")
    plain = config.theta ** -(np.arange(0, head_size, 2) / head_size)
    match config.scaling:
        case "none" | "dynamic":
            slow = np.zeros_like(plain)
        case "linear":
            slow = np.ones_like(plain)
        case "llama3":
            turns = config.original_positions * plain / (2 * math.pi)
            slow = 1 - (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        case "yarn":
            low, high = (_pair_with_turns(config, head_size, turns) for turns in (config.beta_fast, config.beta_slow))
            if config.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_size - 1)
            slow = (np.arange(head_size // 2) - low) / max(high - low, 0.001)
    slow = np.clip(slow, 0.0, 1.0)
    return ((1 - slow) * plain + slow * plain / config.factor).astype(np.float32)


def _pair_with_turns(config: RopeConfig, head_size: int, turns: float) -> float:
    """Index, as a real number, of the pair that turns `turns` times in the original context."""
    return head_size * math.log(config.original_positions / (2 * math.pi * turns)) / (2 * math.log(config.theta))


def layer_frequencies(model: ModelConfig) -> np.ndarray:
    """Radians per position of each pair [L, D_r/2], by layer, for the D_r coordinates of a head that are rotated."""
    everywhere = frequencies(model.rope, model.rotated)
    found = np.broadcast_to(everywhere, (model.num_layers, len(everywhere)))
    if model.rope.window_theta is None:
        return found
    near = frequencies(dataclasses.replace(model.rope, theta=model.rope.window_theta, scaling="none"), model.rotated)
    windowed = np.isin(np.arange(model.num_layers), model.windowed_layers)
    return np.where(windowed[:, None], near, found)


def apply_rope(x: jax.Array, positions: jax.Array, turns: jax.Array | np.ndarray, factor: float) -> jax.Array:
    """`x` [B, T, H, D] with each pair rotated by its position in `positions` [B, T], and scaled by `factor`.

    `turns` [D_r/2] are radians per position; D_r ≤ D coordinates are rotated, the others stay. Angles are in float32.
    """
    angle = positions[..., None].astype(jnp.float32) * turns[None, None, :]
    cos, sin = (factor * f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    half = turns.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
