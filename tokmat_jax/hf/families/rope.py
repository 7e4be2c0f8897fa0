"""Rotary positions as a config of `transformers` has them."""

from dataclasses import replace
from typing import Any

import numpy as np

from tokmat_jax.config import RopeConfig
from tokmat_jax.hf.families.family import require

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(stored: dict[str, Any], max_positions: int) -> RopeConfig:
    """Our settings from `rope_parameters`, to which a family may add a `window_theta`."""
    kind = stored.get("rope_type", "default")
    require(kind in _KINDS, "rope_parameters.rope_type", kind, f"one of {', '.join(_KINDS)}")
    original = stored.get("original_max_position_embeddings") or max_positions
    factor = stored.get("factor")
    if factor is None:
        factor = max_positions / original if kind == "yarn" else 1.0
    rope = RopeConfig(theta=float(stored["rope_theta"]), scaling="none" if kind == "default" else kind,
                      factor=float(factor), original_positions=int(original),
                      partial=float(stored.get("partial_rotary_factor", 1.0)),
                      window_theta=stored.get("window_theta"))
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


def essential(rope: RopeConfig) -> RopeConfig:
    """`rope` with the defaults in the fields that its kind of scaling does not use."""
    kept = {"none": (), "linear": ("factor",), "dynamic": ("factor",),
            "llama3": ("factor", "original_positions", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "truncate", "attention_factor")}
    names = ("theta", "scaling", "partial", "window_theta", *kept[rope.scaling])
    return RopeConfig(**{name: getattr(rope, name) for name in names})


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` from our settings, as `read_rope` takes them."""
    kind = "default" if rope.scaling == "none" else rope.scaling
    stored: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": kind}
    if rope.window_theta is not None:
        stored["window_theta"] = rope.window_theta
    if rope.partial != 1:
        stored["partial_rotary_factor"] = rope.partial
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
