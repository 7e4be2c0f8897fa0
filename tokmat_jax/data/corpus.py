"""A corpus on disk: packed windows of T ids as an ArrayRecord TFDS dataset, its tokenizer and its facts.

    <prepared_dir>/<name>-<fingerprint>/
      corpus.json     what it was made from, and counts
      tokenizer/      see `tokenizer.py`
      unigram.npy     share of each token in the training split [V], float32
      windows/        TFDS dataset, splits `train` and `validation`, feature `tokens` int32 [T]

It is made once: another run with the same text and settings finds it by its fingerprint, wherever the text lies. Beside
it is `known-files.jsonl` (see `content.py`). It appears under its name
only when it is complete. Until then there is a folder beside it, from which a run that was stopped goes on:

    <prepared_dir>/unfinished-<fingerprint>/
      plan.json       what it is made from, and the units of the source
      tokenizer/
      units/          of every unit <number>.train.ids and <number>.validation.ids, int32, and the counts
                      <number>.json, which are written last: a unit that has them is finished

Units are read, and windows written, by several processes if that is wished; what they write depends on the text alone.
Nothing is held in memory that grows with the corpus.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np

from tokmat_jax.config import Config, DataConfig
from tokmat_jax.config.saved import differences
from tokmat_jax.data import sources
from tokmat_jax.data.identity import FORMER, former_fingerprint, identify, noted_tokenizer
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tokmat_jax.errors import UserError, refusal, shown
from tokmat_jax.progress import bar
from tokmat_jax.storage.workdir import TOKENIZER, known_corpus, load_config, read_json, write_json

_FACTS, _PLAN, _UNITS, _WINDOWS = "corpus.json", "plan.json", "units", "windows"
_UNFINISHED = "unfinished-"
_SPLITS = ("train", "validation")
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20
_BLOCK = 1 << 20
"""Ids that are read at once."""
_SHARD = 1 << 26
"""Ids in one file of windows."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """`documents`, `tokens`, `train_windows`, `validation_windows`, `seq_len`, `held_out_by`, and `fingerprint`, which
    tells this corpus from any other."""

    def unigram(self) -> np.ndarray:
        """Share of each token in the training split [V], float32."""
        return np.load(self.folder / "unigram.npy")

    def windows(self, split: str) -> Any:
        """Random access to the windows of `train` or `validation`: records {"tokens": int32 [T]}."""
        import tensorflow_datasets as tfds

        # TFDS takes a leading ~ for the home folder.
        builder: Any = tfds.builder_from_directory((self.folder / _WINDOWS).absolute())
        return builder.as_data_source(split=split)


def prepare(config: Config, workers: int = 1) -> Corpus:
    """The corpus of `config.data` and `config.tokenizer`, made now, by as many as `workers` processes, or found.

    The corpus is the same for any number of them. Of several runs that want the same corpus one makes it, and the
    others wait. What a stopped run has finished is not done again. Raises UserError if the source cannot be read or is
    shorter than two windows, one to train on and one held out, if `prepared_dir` cannot be written, and if a worker
    dies. If there is a run already, use `corpus_of_run`.
    """
    return _load(folder, config.data) if (folder := _given(config.data)) else _found_or_made(
        config, identify(config), workers)


def corpus_of_run(config: Config, workdir: Path) -> Corpus:
    """The corpus that the run in `workdir` has learned from; `config` is the run's, or what it resumes with.

    As `prepare`, but raises UserError if it is another corpus, before that is made, or if its tokenizer gives other
    ids than the run's.
    """
    known = known_corpus(workdir)
    if folder := _given(config.data):
        corpus = _load(folder, config.data)
        _refuse_other(known, corpus.facts["fingerprint"], config, workdir)
    else:
        made_from = identify(config)
        if known.get("format") == FORMER and known["fingerprint"] == (former := former_fingerprint(config)):
            # Made when files were known by path, size and time, and read a little differently.
            folder = _find(config.data, former)
        else:
            _refuse_other(known, made_from["fingerprint"], config, workdir)
        corpus = _load(folder, config.data) if folder else _found_or_made(config, made_from)
    for name in ("documents", "tokens", "train_windows", "validation_windows"):
        if known.get(name, corpus.facts[name]) != corpus.facts[name]:
            raise UserError(f"{workdir} was trained on a corpus of {shown(known[name])} {name.replace('_', ' ')}, from "
                            f"the same files {corpus.facts[name]:,} are made now: choose another --workdir")
    _refuse_other_ids(corpus, workdir)
    return corpus


def _refuse_other(known: dict[str, Any], fingerprint: str, config: Config, workdir: Path) -> None:
    if known["fingerprint"] == fingerprint:
        return
    changed = [f"{name} was {before!r}, now {after!r}; " for name, (before, after) in
               differences(load_config(workdir), config).items() if name in ("data.source", "tokenizer.name")]
    older = "; an older version noted their paths, sizes and times, which count too" * (known.get("format") == FORMER)
    raise UserError(f"{workdir} holds a run on another state of its corpus ({''.join(changed)}fingerprint "
                    f"{shown(known['fingerprint'])}, now {fingerprint}): bring its text and tokenizer back{older}, or "
                    f"choose another --workdir")


def _refuse_other_ids(corpus: Corpus, workdir: Path) -> None:
    try:
        tokenizer = load_tokenizer(workdir / TOKENIZER)
    except UserError:  # a run that was killed while it wrote its tokenizer writes it again
        return
    if not tokenizer.same_ids(corpus.tokenizer):
        raise UserError(f"the tokenizer of {corpus.folder} gives other ids than the one that {workdir} was trained "
                        f"with: bring that tokenizer back, or choose another --workdir")


def _given(config: DataConfig) -> Path | None:
    """The folder of a prepared corpus, if that is the source."""
    kind, _, rest = config.source.partition(":")
    return Path(rest) if kind == "tfds" and (Path(rest) / _FACTS).is_file() else None


def _find(config: DataConfig, fingerprint: str) -> Path | None:
    """The finished corpus with this fingerprint. Its name tells where its text lay when it was made."""
    found = sorted(Path(config.prepared_dir).glob(f"*-{fingerprint}"))
    return next((folder for folder in found if not folder.name.startswith(_UNFINISHED)), None)


def _found_or_made(config: Config, made_from: dict[str, Any], workers: int = 1) -> Corpus:
    fingerprint = made_from["fingerprint"]
    if folder := _find(config.data, fingerprint):
        return _load(folder, config.data)
    name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[-40:]
    folder = Path(config.data.prepared_dir) / f"{name}-{fingerprint}"
    unfinished = folder.with_name(_UNFINISHED + fingerprint)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished.with_name(unfinished.name + ".lock")):
            # The run that was waited for may have made it, and called it after another place of the same text.
            if made := _find(config.data, fingerprint):
                return _load(made, config.data)
            _make(unfinished, config, made_from, workers)
            unfinished.rename(folder)
    except OSError as error:
        raise refusal(error, f"data.prepared_dir: cannot write into {folder.parent}", folder.parent) from None
    return _load(folder, config.data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While it lasts no other process holds the lock of this file, which a process that dies gives back."""
    file = _lock(path)
    try:
        yield
    finally:
        path.unlink()
        file.close()


def _lock(path: Path) -> IO[bytes]:
    waits = False
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                print("waiting for another process, which prepares the same corpus", file=sys.stderr, flush=True)
            waits = True
            fcntl.flock(file, fcntl.LOCK_EX)
        # Who held the lock has removed its file: what is locked then is no longer what others will find.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _load(folder: Path, config: DataConfig) -> Corpus:
    try:
        facts = json.loads((folder / _FACTS).read_text())
        found = facts["seq_len"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / _FACTS} is damaged: delete {folder}, and it is prepared again") from None
    if found != config.seq_len:
        raise UserError(f"{folder} holds windows of {found} tokens, data.seq_len is {config.seq_len}: "
                        f"set --data.seq-len {found} or prepare another corpus")
    return Corpus(folder, load_tokenizer(folder / "tokenizer"), facts)


def _make(folder: Path, config: Config, made_from: dict[str, Any], workers: int) -> None:
    """Fills `folder` with the corpus, from what is in it already."""
    try:
        if not (folder / _FACTS).is_file():
            _open_unfinished(folder, made_from, units := sources.units(config.data))
            tokenizer = _tokenizer(folder / "tokenizer", config)
            counts = _tokenise(folder, tokenizer, config, units, workers)
            _assemble(folder, tokenizer, config.data, counts, made_from, workers)
    except BaseException:
        if not any(folder.glob(f"{_UNITS}/*.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder / _UNITS, ignore_errors=True)
    (folder / _PLAN).unlink(missing_ok=True)


def _open_unfinished(folder: Path, made_from: dict[str, Any], units: Sequence[sources.Unit]) -> None:
    """Keeps what is in `folder` if it belongs to the same units of the same text."""
    # The order of the files is part of what it is made from; where they lie does not matter.
    plan = json.loads(json.dumps(made_from | {"units": [(unit.begin, unit.end) for unit in units]}))
    with contextlib.suppress(UserError):
        if read_json(folder / _PLAN) == plan:
            return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / _UNITS).mkdir(parents=True)
    write_json(folder / _PLAN, plan)


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer in `folder`, made if it is not there; it is there only when it is complete."""
    if not folder.exists():
        half = folder.with_name("tokenizer.unfinished")
        made = load_tokenizer(Path(config.workdir) / TOKENIZER) if noted_tokenizer(config) else make_tokenizer(
            config.tokenizer, _training_texts(config))
        made.save(half)
        half.rename(folder)
    return load_tokenizer(folder)


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a document belongs to the validation split: by a hash of its text, so that copies stay together."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout * 2.0**64


def _training_texts(config: Config) -> Iterator[str]:
    """What a tokenizer is trained on: the documents that are not held out, or all where that leaves none."""
    read = 0
    with bar("reading for the tokenizer") as progress:
        for everything in (False, True):
            for text in sources.documents(config.data):
                if read >= config.tokenizer.training_characters:
                    break
                if everything or not is_held_out(text, config.data.holdout):
                    read += len(text)
                    progress.update(read, "characters")
                    yield text
            if read:
                return


@dataclass(frozen=True)
class _Counts:
    """What a finished unit holds: documents, tokens of each split, and records whose text is null."""

    documents: int = 0
    train: int = 0
    validation: int = 0
    nulls: int = 0

    @property
    def tokens(self) -> int:
        return self.train + self.validation

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(*(mine + theirs for mine, theirs in zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                                               strict=True)))

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.documents:,} documents"


@dataclass(frozen=True)
class _UnitJob:
    """A unit to tokenise into files of `folder`, which holds the tokenizer too."""

    folder: Path
    index: int
    unit: sources.Unit
    data: DataConfig

    def path(self, suffix: str) -> Path:
        return self.folder / _UNITS / f"{self.index:06d}.{suffix}"

    def counts(self) -> _Counts | None:
        """None for a unit that is not finished, or whose files a power failure has cut short."""
        with contextlib.suppress(UserError, OSError, TypeError):
            found = _Counts(**read_json(self.path("json")))
            if all(self.path(f"{split}.ids").stat().st_size == 4 * getattr(found, split) for split in _SPLITS):
                return found
        return None


def _tokenise(
    folder: Path, tokenizer: Tokenizer, config: Config, units: Sequence[sources.Unit], workers: int
) -> list[_Counts]:
    """Counts of every unit, all of which are finished then."""
    jobs = [_UnitJob(folder, index, unit, config.data) for index, unit in enumerate(units)]
    found = [job.counts() for job in jobs]
    waiting = [job for job, counts in zip(jobs, found, strict=True) if counts is None]
    done, total = len(jobs) - len(waiting), sum(filter(None, found), _Counts())
    workers = min(workers, len(waiting))
    with bar("tokenising", len(jobs), done) as progress, _processes(workers) as run:
        here = functools.partial(_tokenise_unit, tokenizer, lambda counts: progress.update(done, str(total + counts)))
        for index, counts in run(_tokenise_apart if workers > 1 else here, waiting):
            found[index] = counts
            done, total = done + 1, total + counts
            progress.update(done, str(total))
    return [counts for counts in found if counts is not None]


def _tokenise_unit(tokenizer: Tokenizer, report: Callable[[_Counts], None], job: _UnitJob) -> tuple[int, _Counts]:
    """Number and counts of the unit; `report` is told the counts now and then."""
    counts, tally = _Counts(), sources.Tally()
    with contextlib.ExitStack() as files:
        out = {split: files.enter_context(job.path(f"{split}.ids").open("wb")) for split in _SPLITS}
        for batch in _batches(sources.documents(job.data, job.unit, tally)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                split = "validation" if is_held_out(text, job.data.holdout) else "train"
                document = np.array([tokenizer.end_of_text, *tokenizer.prefix, *ids], np.int32)
                out[split].write(document.tobytes())
                counts += _Counts(1, **{split: document.size})
            report(counts)
    counts += _Counts(nulls=tally.nulls)
    write_json(job.path("json"), dataclasses.asdict(counts))
    return job.index, counts


def _tokenise_apart(job: _UnitJob) -> tuple[int, _Counts]:
    """`_tokenise_unit` in a process of its own."""
    return _tokenise_unit(_loaded(job.folder / "tokenizer"), lambda _: None, job)


_loaded = functools.cache(load_tokenizer)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents to encode together: many, as long as they are short."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]]:
    """A `map` whose results come as they are ready: in this process, or in several that end with the block."""
    if workers <= 1:
        yield map
        return
    # Not forked: a fork takes the threads' locks with it, of the tokenizers and of JAX.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))

    def run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for future in as_completed([executor.submit(function, job) for job in jobs]):
            yield future.result()

    try:
        yield run
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError(f"one of {workers} workers died, most likely for want of memory: what is finished is kept, "
                        f"run it again with fewer --workers") from None
    finally:
        ours.close()
        executor.shutdown(cancel_futures=True)
        theirs.close()


def _start_worker(parent: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Connection) -> None:
    """Ends this process when the other end of `parent` is closed, as it is when that process is killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)


@dataclass(frozen=True)
class _Ids:
    """A stream of int32 ids that lies in files, of which a block at a time is read."""

    parts: tuple[tuple[Path, int, int], ...]
    """File, first and behind the last id of each part."""

    @property
    def size(self) -> int:
        return sum(end - begin for _, begin, end in self.parts)

    def piece(self, begin: int, end: int) -> "_Ids":
        """The ids `begin` .. `end` of the stream."""
        parts, offset = [], 0
        for path, first, last in self.parts:
            low, high = max(begin - offset, 0), min(end - offset, last - first)
            if low < high:
                parts.append((path, first + low, first + high))
            offset += last - first
        return _Ids(tuple(parts))

    def blocks(self) -> Iterator[np.ndarray]:
        """The stream in pieces [n], none of them long."""
        for path, first, last in self.parts:
            for begin in range(first, last, _BLOCK):
                yield np.fromfile(path, np.int32, min(_BLOCK, last - begin), offset=4 * begin)


def _assemble(
    folder: Path, tokenizer: Tokenizer, data: DataConfig, counts: Sequence[_Counts], made_from: dict[str, Any],
    workers: int,
) -> None:
    """Windows, unigram and facts out of all units, which are done again from the start where that was interrupted."""
    total = sum(counts, _Counts())
    for note in _notes(total, data.separator, made_from["source"]):
        print(f"note: {note}", file=sys.stderr)
    if total.tokens < 2 * data.seq_len:
        shutil.rmtree(folder / _UNITS)  # not worth keeping
        raise UserError(f"data.source {data.source!r} has {total.tokens} tokens, fewer than two windows of "
                        f"{data.seq_len} (one to train on, one held out): give more text or a smaller --data.seq-len")
    train, held_out = (
        _Ids(tuple((folder / _UNITS / f"{index:06d}.{split}.ids", 0, getattr(unit, split))
                   for index, unit in enumerate(counts)))
        for split in _SPLITS
    )
    train, held_out, rule = _ensure_held_out(train, held_out, tokenizer.end_of_text, data)
    unigram = _write(folder / _WINDOWS, {"train": train, "validation": held_out}, data.seq_len, tokenizer.vocab_size,
                     workers)
    np.save(folder / "unigram.npy", unigram)
    write_json(folder / _FACTS, {
        **made_from, "seq_len": data.seq_len, "documents": total.documents, "tokens": total.tokens,
        "nulls": total.nulls, "held_out_by": rule, "vocab_size": tokenizer.vocab_size,
        "train_windows": train.size // data.seq_len, "validation_windows": held_out.size // data.seq_len,
    })


def _notes(total: _Counts, separator: str, source: list[Any]) -> Iterator[str]:
    """What may not have been meant by a `source` (see `identify`) with these counts."""
    if total.nulls:
        yield f"{total.nulls:,} of {total.nulls + total.documents:,} records have null for their text: passed over"
    kind, *files = source
    are_text = kind == "files" and all(way.startswith("text") for way, _ in files)
    if are_text and separator != DataConfig().separator and total.documents <= len(files):
        hint = "; in a shell a line's end is $'\\n', with the dollar" * ("\\" in separator)
        yield f"data.separator {separator!r} occurs in no file, each is one document{hint}"


def _ensure_held_out(train: _Ids, held_out: _Ids, end_of_text: int, config: DataConfig) -> tuple[_Ids, _Ids, str]:
    """Both splits with at least one window; a corpus of few documents gives its last ones, or its end."""
    window, total = config.seq_len, train.size + held_out.size
    if held_out.size >= window and train.size >= window:
        return train, held_out, "hash of the document"
    everything = _Ids(train.parts + held_out.parts)
    latest = max(window, total - max(window, int(config.holdout * total)))
    cut = _last(end_of_text, everything, window, latest + 1)
    rule = "end of the only document" if cut is None else "last documents"
    cut = latest if cut is None else cut
    return everything.piece(0, cut), everything.piece(cut, total), rule


def _last(token: int, ids: _Ids, begin: int, end: int) -> int | None:
    """Where `token` stands for the last time in `begin` .. `end`."""
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
    ids: _Ids
    seq_len: int
    vocab_size: int


def _write(folder: Path, streams: dict[str, _Ids], seq_len: int, vocab_size: int, workers: int) -> np.ndarray:
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
    with bar("writing windows", total) as progress, _processes(min(workers, len(jobs) - 1)) as run:
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


def _shards(folder: Path, split: str, ids: _Ids, seq_len: int, vocab_size: int) -> list[_ShardJob]:
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
    """The job, how many bytes its records have, and how often each token occurs [V]."""
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


def _windows(ids: _Ids, seq_len: int) -> Iterator[np.ndarray]:
    """Windows [n, T] of a stream of ids, some at a time; a remainder shorter than a window is dropped."""
    rest = np.zeros(0, np.int32)
    for block in ids.blocks():
        stream = np.concatenate([rest, block])
        whole = stream.size // seq_len * seq_len
        yield stream[:whole].reshape(-1, seq_len)
        rest = stream[whole:]
