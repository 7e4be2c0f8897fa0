"""Batches of windows through Grain: one global order, of which every process reads the rows that its devices hold.

The order depends only on the seed and the batch size, and a position in it is a number of batches, so a run can resume
with another number of processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np


class Windows(Protocol):
    """Random access to records {"tokens": int32 [T]}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]: ...


class Batches:
    """An endless iterator of ids [rows, T] int32 that can be set to any position."""

    def __init__(self, iterator: Any, left_out: Sequence[int] = ()):
        self._iterator, self._left_out = iterator, frozenset(left_out)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> np.ndarray:
        while self._left_out and self.position in self._left_out:
            next(self._iterator)
        return next(self._iterator)

    @property
    def position(self) -> int:
        """Number of batches before the next one."""
        return self._iterator.get_state()["next_index"]

    def seek(self, position: int) -> None:
        """Continues after the first `position` batches."""
        self._iterator.set_state({"next_index": position})


def train_batches(
    windows: Windows, batch_size: int, seed: int, rows: slice = slice(None), left_out: Sequence[int] = ()
) -> Batches:
    """The `rows` of every batch of `batch_size` windows; each epoch is a new permutation of all `windows` by `seed`.

    Batches at the positions `left_out` are skipped.
    """

    def read(indices: np.ndarray) -> np.ndarray:
        return np.stack([record["tokens"] for record in windows.__getitems__(indices[rows].tolist())])

    # Indices are shuffled, not windows, so no process reads a row of another one.
    batches = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)
    return Batches(iter(batches.map(read).to_iter_dataset(options)), left_out)


def validation_batches(windows: Windows, batch_size: int, num_batches: int) -> Iterator[np.ndarray]:
    """The first `num_batches` batches [batch_size, T] of `windows`, in order; starts over when they run out."""
    for batch in range(num_batches):
        rows = range(batch * batch_size, (batch + 1) * batch_size)
        yield np.stack([windows[row % len(windows)]["tokens"] for row in rows])
