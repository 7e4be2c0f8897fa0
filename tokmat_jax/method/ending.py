"""Where a sample ends: at a token that ends it, unless such tokens are barred there, or with its budget.

An end is barred as long as more than `ends_within` tokens of the budget remain. It is then no candidate for the
projection, so that texts of different methods can be compared at equal length.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import GenerationConfig

_MOST = 2**31 - 1
Ends = tuple[int, ...]
"""The tokens that end a sample."""


@struct.dataclass
class Barred:
    """Tokens that are no candidates at some places."""

    tokens: Ends = struct.field(pytree_node=False)
    """The ids."""
    places: jax.Array
    """[...] bool: they are barred there."""

    def allowed(self, scores: jax.Array, ids: jax.Array) -> jax.Array:
        """`scores` [..., P] of the tokens `ids` [P], −∞ for those that are barred."""
        barred = self.places[..., None] & jnp.reshape(is_end(ids, self.tokens), (1,) * self.places.ndim + (-1,))
        return jnp.where(barred, -jnp.inf, scores)


def make_ends_within(settings: GenerationConfig) -> jax.Array | None:
    """Number [] of last tokens of the budget among which a sample may end; None if it may end anywhere."""
    return ends_within(settings.min_new_tokens, settings.max_new_tokens)


def ends_within(min_new_tokens: int, max_new_tokens: int) -> jax.Array | None:
    """As `make_ends_within`, for a budget of `max_new_tokens`."""
    return jnp.int32(min(max(0, max_new_tokens - min_new_tokens), _MOST)) if min_new_tokens else None


def bar(remaining: jax.Array, within: jax.Array | None, ends: Ends) -> Barred | None:
    """What is barred at places [...] from which on `remaining` [...] tokens of the budget are left."""
    return None if within is None else Barred(ends, remaining > within)


def is_end(tokens: jax.Array, ends: Ends) -> jax.Array:
    """Which of `tokens` are one of the `ends`, bool of the same shape."""
    return functools.reduce(jnp.logical_or, (tokens == end for end in ends), jnp.zeros(tokens.shape, bool))


def up_to_end(tokens: jax.Array, ends: Ends) -> jax.Array:
    """Number [B] of `tokens` [B, M] up to and including the first that ends a sample."""
    found = is_end(tokens, ends).astype(jnp.int32)
    return jnp.sum((jnp.cumsum(found, axis=1) - found == 0).astype(jnp.int32), axis=1)
