"""An unfinished sample: callers can read its tail, change it and continue from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from tokmat_jax.errors import UserError
from tokmat_jax.generation.batches import Row
from tokmat_jax.generation.requests import whole_number
from tokmat_jax.method.algorithm import DecodeState
from tokmat_jax.method.table import Vocabulary, look_up, read
from tokmat_jax.method.tail import Tail


@dataclass(frozen=True)
class PartialSample:
    """One sample between two steps.

    Immutable: `Generator.step`, `Generator.pin` and `Generator.replace` return a new one, so that callers can continue
    from the same sample in two ways.
    """

    row: Row
    state: DecodeState
    """State of a batch of one row."""
    tail: Tail
    tokens: tuple[int, ...] = ()
    """Ids committed so far, without the prompt."""

    @property
    def done(self) -> bool:
        """Whether the sample is complete."""
        return bool(self.state.done[0])

    @property
    def slots(self) -> np.ndarray:
        """z̃ [K, d], front first: the input of the next step."""
        return np.asarray(self.state.tail[0])

    @property
    def pins(self) -> list[int | None]:
        """The token that each of the K slots is pinned to, None if the slot is free."""
        if self.state.pinned is None:
            return [None] * self.state.tail.shape[1]
        return [None if token < 0 else token for token in np.asarray(self.state.pinned[0]).tolist()]


def held_at(partial: PartialSample, slot: int, ids: Sequence[int], vocabulary: Vocabulary) -> PartialSample:
    """Pins the slots of `partial` from `slot` on to `ids` and sets their vectors. Raises UserError if the ids do not
    fit."""
    _check(partial, slot, len(ids))
    left = int(partial.state.budget[0] - partial.state.num_committed[0])
    if slot + len(ids) > left:
        raise UserError(f"{left} tokens are left of the budget, slots {slot}..{slot + len(ids) - 1} lie beyond it")
    vectors = np.asarray(look_up(vocabulary.table, jnp.array(ids, jnp.int32)))
    partial = with_vectors(partial, slot, vectors, vocabulary)
    pinned = partial.state.pinned
    if pinned is None:
        pinned = jnp.full(partial.state.tail.shape[:2], -1, jnp.int32)
    pinned = pinned.at[0, slot : slot + len(ids)].set(jnp.array(ids, jnp.int32))
    return replace(partial, state=replace(partial.state, pinned=pinned))


def with_vectors(
    partial: PartialSample, slot: int, vectors: np.ndarray, vocabulary: Vocabulary
) -> PartialSample:
    """Puts `vectors` [N, d] into the slots of `partial` from `slot` on and unpins these slots.

    Raises UserError if the vectors do not fit."""
    size = partial.state.tail.shape[-1]
    if vectors.ndim != 2 or vectors.shape[1] != size or vectors.dtype.kind in "OSUMm" or not np.isfinite(vectors).all():
        raise UserError(f"expected finite vectors of {size} numbers, found the shape {vectors.shape}")
    _check(partial, slot, len(vectors))
    tail = partial.state.tail.at[0, slot : slot + len(vectors)].set(jnp.asarray(vectors, partial.state.tail.dtype))
    pinned = partial.state.pinned
    if pinned is not None:
        pinned = pinned.at[0, slot : slot + len(vectors)].set(-1)
    nearest = partial.state.nearest
    if nearest is not None:  # the drafts of the next pass
        tokens, _ = read(jnp.asarray(vectors, tail.dtype), vocabulary, 1.0)
        nearest = nearest.at[0, slot : slot + len(vectors)].set(tokens)
    return replace(partial, state=replace(partial.state, tail=tail, pinned=pinned, nearest=nearest))


def _check(partial: PartialSample, slot: int, count: int) -> None:
    length = partial.state.tail.shape[1]
    if not 0 <= whole_number("slot", slot) <= length - count:
        raise UserError(f"the tail has the slots 0..{length - 1}, found slots {slot}..{slot + count - 1}")
