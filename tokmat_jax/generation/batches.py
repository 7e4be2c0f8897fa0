"""Pads shapes to powers of two, so that prompts of similar length share one compiled program.

Rows are independent: neither the bucket nor the other rows of a batch change a sample.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from tokmat_jax.keys import seed_key

SMALLEST_PROMPT, SMALLEST_HISTORY = 16, 64
_SMALLEST_CHUNK, _LARGEST_CHUNK = 4, 16

T = TypeVar("T")
R = TypeVar("R")
Room = Callable[[int], tuple[int, int]]
"""Length of the shortest row of a batch → (most rows, longest row) that fit into the batch."""


@dataclass(frozen=True)
class Row:
    """One sample to generate."""

    prompt: str
    ids: list[int]
    """Ids of the prompt, at least one."""
    number: int
    """Index of the sample among those of its prompt, from 0."""


@dataclass(frozen=True)
class Batch:
    """Rows padded to their bucket of shapes. Padding rows have a budget of 0."""

    ids: np.ndarray | jax.Array
    """Prompts [B, P] int32, padded after their end."""
    lengths: np.ndarray | jax.Array
    """[B] int32, number of ids of each prompt."""
    budgets: np.ndarray | jax.Array
    """[B] int32, number of tokens that each row may commit."""
    names: np.ndarray | jax.Array
    """[B, 3] uint32, from which `sample_key` makes the key of each row."""
    capacity: int
    """Positions of the history, the same for every length in the bucket."""


def make_batch(rows: Sequence[Row], max_new_tokens: int, seed: int, max_positions: int, fill: int) -> Batch:
    """Pads `rows` to their bucket: all lengths in a bucket get the same shapes. Ids after a prompt's end are `fill`."""
    size = bucket(len(rows), 1)
    width = min(bucket(max(len(row.ids) for row in rows), SMALLEST_PROMPT), max_positions)
    capacity = min(bucket(width + max_new_tokens, SMALLEST_HISTORY), max_positions)
    ids = np.full((size, width), fill, np.int32)
    lengths, budgets = np.ones(size, np.int32), np.zeros(size, np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        lengths[index], budgets[index] = len(row.ids), max_new_tokens
    names = np.zeros((size, 3), np.uint32)
    names[: len(rows)] = [(seed, zlib.crc32(np.asarray(row.ids, np.int32).tobytes()), row.number) for row in rows]
    return Batch(ids, lengths, budgets, names, capacity)


def sample_key(name: jax.Array) -> jax.Array:
    """The key of a sample from its `name` [3]: seed, checksum of the prompt's ids, number. Independent of the batch."""
    seed, prompt, number = name
    return jax.random.fold_in(jax.random.fold_in(seed_key(seed), prompt), number)


def chunk(max_new_tokens: int, one_a_step: bool = True) -> int:
    """Number of steps of one scan: a power of two, so that few budgets need a compilation and few steps are wasted.

    If a step may commit several tokens (not `one_a_step`), nobody knows how many steps a text takes: the scan is short.
    """
    return min(bucket(max_new_tokens, _SMALLEST_CHUNK), _LARGEST_CHUNK) if one_a_step else _SMALLEST_CHUNK


def bucket(length: int, smallest: int) -> int:
    """The smallest power of two ≥ `length`, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def in_batches(
    rows: Sequence[T], lengths: Sequence[int], room: Room, work: Callable[[list[T]], Sequence[R]]
) -> list[R]:
    """Results of `work` for each of `rows`, in their order. `work` gets a batch at a time, shortest rows first."""
    done: dict[int, R] = {}
    for batch in _batches(lengths, room):
        done |= zip(batch, work([rows[index] for index in batch]), strict=True)
    return [done[index] for index in range(len(rows))]


def _batches(lengths: Sequence[int], room: Room) -> Iterator[list[int]]:
    """Indices into `lengths` in batches that fit into `room`, shortest rows first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        count, longest = room(lengths[order[0]])
        batch = [index for index in order[:count] if lengths[index] <= longest]
        yield batch
        order = order[len(batch) :]


def until_done(state: Any, advance: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Advances `state` (with its `done` [B], at least one False) until all rows are done; returns the steps of all
    scans, concatenated, [steps, B, …] in NumPy. `advance` may donate the state that it is given."""
    scans = []
    while not bool(np.all(state.done)):
        state, steps = advance(state)
        scans.append(jax.tree.map(np.asarray, steps))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *scans)
