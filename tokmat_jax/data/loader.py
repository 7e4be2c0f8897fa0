"""Batches of windows through Grain: a global shuffle, one shard per process, a position that can be saved."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np


def train_batches(windows: Any, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1) -> Any:
    """An endless, resumable iterator of ids [batch_size, T] int32 for one process.

    Every epoch is a new permutation of all `windows`, a function of `seed`; a process takes every
    `process_count`-th of it. The iterator has `get_state` and `set_state`.
    """
    dataset = (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()[process_index::process_count]
        .repeat()
        .map(lambda record: record["tokens"])
        .batch(batch_size, drop_remainder=True)
    )
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)))


def validation_batches(windows: Any, batch_size: int, num_batches: int) -> Iterator[np.ndarray]:
    """The first `num_batches` batches [batch_size, T] of `windows`, in order; starts over where they run out."""
    for batch in range(num_batches):
        rows = range(batch * batch_size, (batch + 1) * batch_size)
        yield np.stack([windows[row % len(windows)]["tokens"] for row in rows])
