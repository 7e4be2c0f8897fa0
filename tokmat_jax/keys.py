"""Random keys, whose numbers depend on the seed alone, whatever JAX's own settings say."""

import jax

from tokmat_jax.errors import UserError

SETTINGS = {"jax_enable_x64": False, "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
            "jax_high_dynamic_range_gumbel": False}
"""Settings of JAX that would change every number, and the value that each must have."""


def seed_key(seed: int | jax.Array) -> jax.Array:
    """The key of a `seed` in 0..2³²−1. Everything random here begins with one.

    Raises UserError if a setting of JAX would give it other numbers.
    """
    for name, value in SETTINGS.items():
        if (found := getattr(jax.config, name)) != value:
            raise UserError(f"{name} is {found!r}, which changes every number: set it to {value!r}")
    return jax.random.key(seed, impl="threefry2x32")
