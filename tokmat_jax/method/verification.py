"""Commit when verified: drafts are checked in the pass that commits the token before them (METHOD §4).

    position     n − 1     n      n + 1   …           n      n + 1   …
    query        newest   y_0     y_1     …           z̃_0     z̃_1     …       the two never see each other
    output       ẑ_n      ẑ_n+1   ẑ_n+2   …           ẑ_n+1   ẑ_n+2   …

x_n, the token nearest to ẑ_n, is always committed. As long as y_i equals the token that was committed at its position,
the output after it is what the decoder would have computed there anyway, and one more token is committed. A pass
commits 1 to M + 1 tokens. Whatever the drafts are, the text is that of immediate projection (K = 1, η = 1, with the
same K given to the model).
"""

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import Draft, GenerationConfig

_LOOKED_UP = (3, 2)
"""Numbers of last tokens whose earlier occurrence is looked up; the first that is found counts."""


@struct.dataclass
class Verification:
    """What a pass checks; static, because the shapes of a pass depend on it."""

    num_drafts: int = struct.field(pytree_node=False)
    """M, 0..K − 1."""
    draft: Draft = struct.field(pytree_node=False)
    """Source of the drafts."""


@struct.dataclass
class Drafts:
    """Tokens to check at the positions n .. n + M − 1; they enter the pass as if they were committed."""

    tokens: jax.Array
    """y [B, M]; −1 for none, which is never accepted."""
    vectors: jax.Array
    """The vectors that they would have in the history [B, M, d]."""


def make_verification(settings: GenerationConfig) -> Verification | None:
    """None unless commits are verified."""
    if settings.commit != "verified":
        return None
    return Verification(min(settings.max_commit, settings.tail_length) - 1, settings.draft)


def num_accepted(drafts: jax.Array, committed: jax.Array) -> jax.Array:
    """Number [B] of `drafts` [B, M], from the first on, that equal the `committed` [B, ≥ M] at their positions."""
    same = drafts == committed[:, : drafts.shape[1]]
    return jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=1), axis=1)


def look_up_drafts(text: jax.Array, num_committed: jax.Array, num_drafts: int) -> jax.Array:
    """The M tokens that followed the latest earlier occurrence of the last tokens: [B, M], −1 if there was none.

    `text` [B, S] holds the tokens of the first `num_committed` n [B] positions. A run that reaches the end of the text
    continues from its own beginning, as a loop does (prompt lookup; A. Saxena 2023).
    """
    position = jnp.arange(text.shape[1])[None, :]
    last = num_committed[:, None] - 1
    drafts = jnp.full((text.shape[0], num_drafts), -1, jnp.int32)
    for length in reversed(_LOOKED_UP):  # the longest is written last
        same = (position < last) & (position >= length - 1)
        for back in range(length):
            wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
            same &= (jnp.roll(text, back, axis=1) == wanted) & (last >= back)
        found = jnp.max(jnp.where(same, position, -1), axis=1, keepdims=True)
        period = jnp.maximum(last - found, 1)
        following = jnp.take_along_axis(text, found + 1 + jnp.arange(num_drafts)[None, :] % period, axis=1)
        drafts = jnp.where(found >= 0, following, drafts)
    return drafts


def choose_drafts(
    verification: Verification, nearest: jax.Array | None, text: jax.Array | None, num_committed: jax.Array
) -> jax.Array:
    """The M drafts [B, M] of a pass, from the `nearest` tokens [B, K] of the slots, the `text` [B, S] or both."""
    count = verification.num_drafts
    looked_up = None if text is None else look_up_drafts(text, num_committed, count)
    if nearest is None or verification.draft == "lookup":
        assert looked_up is not None
        return looked_up
    own = nearest[:, :count]
    return own if looked_up is None else jnp.where(looked_up >= 0, looked_up, own)
