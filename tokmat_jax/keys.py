"""Random keys. Their numbers depend on the seed alone: JAX settings that would change them are refused."""

import jax

from tokmat_jax.errors import UserError

SETTINGS = {"jax_enable_x64": False, "jax_threefry_partitionable": True, "jax_random_seed_offset": 0,
            "jax_high_dynamic_range_gumbel": False}
"""JAX settings that affect every random number, with the value that each must have."""


def seed_key(seed: int | jax.Array) -> jax.Array:
    """The key of a `seed` in 0..2³²−1. All randomness here is derived from such keys.

    Raises UserError if a JAX setting would change the key's numbers.
    """
    for name, value in SETTINGS.items():
        if (found := getattr(jax.config, name)) != value:
            raise UserError(f"{name} is {found!r}, which changes every number: set it to {value!r}")
    return jax.random.key(seed, impl="threefry2x32")
