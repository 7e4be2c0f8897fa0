"""The units of a source as files of ids, several units at a time.

    units/<number>.train.ids, <number>.validation.ids    int32
    units/<number>.json                                  counts, written last: a unit that has them is finished
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokmat_jax.config import DataConfig
from tokmat_jax.data import pool, sources
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.progress import bar
from tokmat_jax.storage.files import read_json, write_json
from tokmat_jax.storage.workdir import TOKENIZER

UNITS = "units"
SPLITS = ("train", "validation")
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a document belongs to the validation split: by a hash of its text, so that copies stay together."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout * 2.0**64


@dataclass(frozen=True)
class Counts:
    """What a finished unit holds: documents, tokens of each split, and records whose text is null."""

    documents: int = 0
    train: int = 0
    validation: int = 0
    nulls: int = 0

    @property
    def tokens(self) -> int:
        return self.train + self.validation

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                                               strict=True)))

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.documents:,} documents"


@dataclass(frozen=True)
class _UnitJob:
    """A unit to tokenise into files in `folder`, which also holds the tokenizer."""

    folder: Path
    index: int
    unit: sources.Unit
    data: DataConfig

    def path(self, suffix: str) -> Path:
        return self.folder / UNITS / f"{self.index:06d}.{suffix}"

    def counts(self) -> Counts | None:
        """The unit's counts; None if it is not finished, or if a power failure has truncated its files."""
        with contextlib.suppress(UserError, OSError, TypeError):
            found = Counts(**read_json(self.path("json")))
            if all(self.path(f"{split}.ids").stat().st_size == 4 * getattr(found, split) for split in SPLITS):
                return found
        return None


def tokenise(
    folder: Path, tokenizer: Tokenizer, data: DataConfig, units: Sequence[sources.Unit], workers: int
) -> list[Counts]:
    """Tokenises all units that are not finished yet, and returns the counts of every unit."""
    jobs = [_UnitJob(folder, index, unit, data) for index, unit in enumerate(units)]
    found = [job.counts() for job in jobs]
    waiting = [job for job, counts in zip(jobs, found, strict=True) if counts is None]
    done, total = len(jobs) - len(waiting), sum(filter(None, found), Counts())
    workers = min(workers, len(waiting))
    with bar("tokenising", len(jobs), done) as progress, pool.processes(workers) as run:
        here = functools.partial(_tokenise_unit, tokenizer, lambda counts: progress.update(done, str(total + counts)))
        for index, counts in run(_tokenise_apart if workers > 1 else here, waiting):
            found[index] = counts
            done, total = done + 1, total + counts
            progress.update(done, str(total))
    return [counts for counts in found if counts is not None]


def _tokenise_unit(tokenizer: Tokenizer, report: Callable[[Counts], None], job: _UnitJob) -> tuple[int, Counts]:
    """Tokenises a unit and returns its index and counts; `report` is called with the counts so far."""
    counts, tally = Counts(), sources.Tally()
    with contextlib.ExitStack() as files:
        out = {split: files.enter_context(job.path(f"{split}.ids").open("wb")) for split in SPLITS}
        for batch in _batches(sources.documents(job.data, job.unit, tally)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                split = "validation" if is_held_out(text, job.data.holdout) else "train"
                document = np.array([tokenizer.end_of_text, *tokenizer.prefix, *ids], np.int32)
                out[split].write(document.tobytes())
                counts += Counts(1, **{split: document.size})
            report(counts)
    counts += Counts(nulls=tally.nulls)
    write_json(job.path("json"), dataclasses.asdict(counts))
    return job.index, counts


def _tokenise_apart(job: _UnitJob) -> tuple[int, Counts]:
    """`_tokenise_unit` in a process of its own."""
    return _tokenise_unit(_loaded(job.folder / TOKENIZER), lambda _: None, job)


_loaded = functools.cache(load_tokenizer)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents to encode together: many if they are short."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
