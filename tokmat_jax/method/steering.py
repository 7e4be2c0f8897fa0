"""Steering: predictions of chosen slots are drawn towards a direction (METHOD §4, the control surface).

    ẑ_j ← ẑ_j + w(t) γ_j R u(v)     w(t) = begin + (end − begin) t,  t ∈ [0, 1] from a sample's first token to its last

v is a user's vector, or the mean of some words' embeddings. γ_j is 0 in slots that are not chosen. w depends on the
position that a slot will take, not on the step, so a steered text does not depend on how fast it is committed.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig, SteeringSchedule
from tokmat_jax.method.table import unit

_ENDS: dict[SteeringSchedule, tuple[float, float]] = {"constant": (1.0, 1.0), "fade": (1.0, 0.0), "rise": (0.0, 1.0)}


@struct.dataclass
class Steering:
    """Direction, strength and schedule; a pytree of numbers."""

    direction: jax.Array
    """u(v) [d], of norm 1."""
    strength: jax.Array
    """γ [K], front first, in units of R; negative pushes away."""
    begin: jax.Array
    """w [] at a sample's first token."""
    end: jax.Array
    """w [] at the last one of its budget."""
    budget: jax.Array
    """Tokens [] of a sample."""


def make_steering(settings: GenerationConfig, direction: jax.Array | None) -> Steering | None:
    """Steering along `direction` [d] of any norm; None if γ = 0, which needs no direction."""
    if settings.steering == 0.0:
        return None
    assert direction is not None
    chosen = jnp.isin(jnp.arange(settings.tail_length),
                      jnp.array(settings.steering_slots or range(settings.tail_length)))
    begin, end = _ENDS[settings.steering_schedule]
    return Steering(unit(jnp.asarray(direction, jnp.float32)),
                    jnp.where(chosen, settings.steering, 0.0).astype(jnp.float32), jnp.float32(begin),
                    jnp.float32(end), jnp.float32(settings.max_new_tokens))


def steer(prediction: jax.Array, remaining: jax.Array, steering: Steering, radius: float) -> jax.Array:
    """`prediction` [B, K, d] drawn towards the direction.

    `remaining` [B, K] counts the tokens of the budget from each slot's own on; positions after the budget count as
    its last.
    """
    place = jnp.clip(1.0 - (remaining - 1.0) / jnp.maximum(steering.budget - 1.0, 1.0), 0.0, 1.0)
    weight = steering.begin + (steering.end - steering.begin) * place
    shift = (weight * steering.strength[None, :])[..., None] * steering.direction[None, None, :]
    return prediction + radius * shift


def direction_of(words: jax.Array) -> jax.Array:
    """The direction [d] of the mean of some words' vectors [W, d], all with the same weight."""
    return jnp.mean(unit(words), axis=0)
