"""Classifier-free guidance: combining two predictions (METHOD §4).

Guidance is off at s = 1. The caller decides what the unconditional pass may see: the last committed token and the tail
before the query, and nothing earlier. In training, history dropout hides the same positions (`model/attention.py`).
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig


@struct.dataclass
class Guidance:
    """How far a prediction goes beyond the unconditional one; a pytree of numbers."""

    scale: jax.Array
    """s []."""


def make_guidance(settings: GenerationConfig) -> Guidance | None:
    """None at s = 1."""
    return None if settings.guidance_scale == 1.0 else Guidance(jnp.float32(settings.guidance_scale))


def combine(conditional: jax.Array, unconditional: jax.Array, guidance_scale: jax.Array | float) -> jax.Array:
    """ẑ = ẑ_u + s (ẑ_c − ẑ_u); all predictions [..., d]."""
    return unconditional + guidance_scale * (conditional - unconditional)


def guide(conditional, unconditional, guidance: Guidance):
    """Combines two `predict` functions into one, so the decoder needs to know nothing of guidance.

    Each takes a decoder state and returns (prediction, memory). The unconditional one predicts the tail alone
    [B, K, d]; the memory that is kept is the conditional one's.
    """

    def predict(state):
        prediction, memory = conditional(state)
        free, _ = unconditional(state)
        return combine(prediction[:, -free.shape[1]:], free, guidance.scale), memory

    return predict
