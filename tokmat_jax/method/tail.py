"""The liquid tail's settings as numbers: what Algorithm 1 and its controls read (METHOD §4).

A control at its neutral value is None: it adds no code to the compiled program, and the plain algorithm runs bit for
bit.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.ending import make_ends_within
from tokmat_jax.method.guidance import Guidance, make_guidance
from tokmat_jax.method.history import Entry, make_entry
from tokmat_jax.method.maturation import profile_maturity
from tokmat_jax.method.noise import FreshNoise, make_fresh_noise
from tokmat_jax.method.repulsion import Repulsion, make_repulsion
from tokmat_jax.method.stability import Stability, make_stability
from tokmat_jax.method.steering import Steering, make_steering
from tokmat_jax.method.verification import Verification, make_verification


@struct.dataclass
class Tail:
    """How the tail is run; a pytree of numbers, so another value needs no new compilation."""

    maturity: jax.Array
    """α [K], front first, in [0, 1]."""
    rate: jax.Array
    """η [K], front first, in [0, 1]."""
    noise: jax.Array
    """σ [], norm of the embryos in units of R."""
    temperature: jax.Array
    """τ [] of the entropy that is reported."""
    entropy_candidates: int | None = struct.field(pytree_node=False)
    """Number of nearest tokens over which the entropy is taken; None for all of V."""
    model_tail_length: jax.Array
    """The K [] that the model is given at committed positions; at slots it is given their own."""
    guidance: Guidance | None
    repulsion: Repulsion | None
    steering: Steering | None
    fresh_noise: FreshNoise | None
    entry: Entry
    """How a committed vector changes when it enters the history."""
    stability: Stability | None
    """When slots count as settled; None unless commits are stable."""
    verification: Verification | None
    """What is checked in the pass that commits. If this and `stability` are None, only the front is committed."""
    ends_within: jax.Array | None
    """Number [] of last tokens of the budget among which a sample may end; None if it may end anywhere."""


def make_tail(settings: GenerationConfig, direction: jax.Array | None = None) -> Tail:
    """The Tail of `settings`; steering, if it is on, draws predictions towards `direction` [d]."""
    front = settings.max_maturity if settings.rate is None else settings.rate
    told = settings.tail_length if settings.model_tail_length is None else settings.model_tail_length
    return Tail(
        maturity=_along(settings, settings.max_maturity),
        rate=jnp.array(front, jnp.float32) if isinstance(front, tuple) else _along(settings, front),
        noise=jnp.float32(settings.tail_noise),
        temperature=jnp.float32(settings.entropy_temperature),
        entropy_candidates=settings.entropy_candidates,
        model_tail_length=jnp.int32(told),
        guidance=make_guidance(settings),
        repulsion=make_repulsion(settings),
        steering=make_steering(settings, direction),
        fresh_noise=make_fresh_noise(settings),
        entry=make_entry(settings),
        stability=make_stability(settings),
        verification=make_verification(settings),
        ends_within=make_ends_within(settings),
    )


def _along(settings: GenerationConfig, front: float) -> jax.Array:
    """Numbers [K] that start at `front` and decrease as the profile does."""
    length = settings.tail_length
    return profile_maturity(jnp.arange(length), jnp.int32(length), settings.profile, jnp.float32(front))
