"""Streams of ids in files, and their windows of T ids as an ArrayRecord TFDS dataset."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.data import pool
from tokmat_jax.progress import bar

_BLOCK = 1 << 20
"""Ids that are read at once."""
_SHARD = 1 << 26
"""Ids in one file of windows."""


@dataclass(frozen=True)
class Ids:
    """A stream of int32 ids in files, read one block at a time."""

    parts: tuple[tuple[Path, int, int], ...]
    """File, index of the first id, and index after the last id, of each part."""

    @property
    def size(self) -> int:
        return sum(end - begin for _, begin, end in self.parts)

    def piece(self, begin: int, end: int) -> "Ids":
        """The ids `begin` .. `end` of the stream."""
        parts, offset = [], 0
        for path, first, last in self.parts:
            low, high = max(begin - offset, 0), min(end - offset, last - first)
            if low < high:
                parts.append((path, first + low, first + high))
            offset += last - first
        return Ids(tuple(parts))

    def blocks(self) -> Iterator[np.ndarray]:
        """The stream in short pieces [n]."""
        for path, first, last in self.parts:
            for begin in range(first, last, _BLOCK):
                yield np.fromfile(path, np.int32, min(_BLOCK, last - begin), offset=4 * begin)


def last_of(token: int, ids: Ids, begin: int, end: int) -> int | None:
    """The last position of `token` in `begin` .. `end`, None if it does not occur."""
    while begin < end:
        start = max(begin, end - _BLOCK)
        found = np.flatnonzero(np.concatenate([*ids.piece(start, end).blocks()]) == token)
        if found.size:
            return start + int(found[-1])
        end = start
    return None


@dataclass(frozen=True)
class _ShardJob:
    """Windows of `seq_len` ids to write into one file."""

    path: Path
    split: str
    ids: Ids
    seq_len: int
    vocab_size: int


def write_windows(folder: Path, streams: dict[str, Ids], seq_len: int, vocab_size: int, workers: int) -> np.ndarray:
    """Writes the windows as a TFDS dataset; returns the share of each token in `train` [V], float32.

    A remainder shorter than a window is dropped. TFDS's own builder would hold a split in memory to sort it; these
    shards have the format and the names that it reads.
    """
    import tensorflow_datasets as tfds

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    jobs = [job for split, ids in streams.items() for job in _shards(folder, split, ids, seq_len, vocab_size)]
    num_bytes, counts = dict.fromkeys(streams, 0), np.zeros(vocab_size, np.int64)
    total, done = sum(job.ids.size // seq_len for job in jobs), 0
    with bar("writing windows", total) as progress, pool.processes(min(workers, len(jobs) - 1)) as run:
        for job, size, tokens in run(_write_shard, jobs):
            num_bytes[job.split] += size
            counts += tokens if job.split == "train" else 0
            done += job.ids.size // seq_len
            progress.update(done)
    tfds.folder_dataset.write_metadata(
        data_dir=folder.absolute(), features=_features(seq_len), check_data=False, disable_shuffling=True,
        split_infos=[
            tfds.core.SplitInfo(
                name=split, num_bytes=num_bytes[split],
                shard_lengths=[job.ids.size // seq_len for job in jobs if job.split == split],
            )
            for split in streams
        ],
    )
    return (counts / counts.sum()).astype(np.float32)


def _shards(folder: Path, split: str, ids: Ids, seq_len: int, vocab_size: int) -> list[_ShardJob]:
    num_windows, each = ids.size // seq_len, max(1, _SHARD // seq_len)
    starts = range(0, num_windows, each)
    return [
        _ShardJob(folder / f"packed_windows-{split}.array_record-{index:05d}-of-{len(starts):05d}", split,
                  ids.piece(start * seq_len, min(start + each, num_windows) * seq_len), seq_len, vocab_size)
        for index, start in enumerate(starts)
    ]


def _features(seq_len: int) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({"tokens": tfds.features.Tensor(shape=(seq_len,), dtype=np.int32)})


def _write_shard(job: _ShardJob) -> tuple[_ShardJob, int, np.ndarray]:
    """Writes a file of windows; returns the job, the bytes of its records, and how often each token occurs [V]."""
    from array_record.python.array_record_module import ArrayRecordWriter

    features, num_bytes, counts = _features(job.seq_len), 0, np.zeros(job.vocab_size, np.int64)
    writer = ArrayRecordWriter(str(job.path), "group_size:1")  # for random access
    for windows in _windows(job.ids, job.seq_len):
        counts += np.bincount(windows.reshape(-1), minlength=job.vocab_size)
        for row in windows:
            record = features.serialize_example({"tokens": row})
            writer.write(record)
            num_bytes += len(record)
    writer.close()
    return job, num_bytes, counts


def _windows(ids: Ids, seq_len: int) -> Iterator[np.ndarray]:
    """Windows [n, T] of a stream of ids, n at a time; a remainder shorter than a window is dropped."""
    rest = np.zeros(0, np.int32)
    for block in ids.blocks():
        stream = np.concatenate([rest, block])
        whole = stream.size // seq_len * seq_len
        yield stream[:whole].reshape(-1, seq_len)
        rest = stream[whole:]
