"""`python -m tokmat_jax data`: corpora at scale.

    prepare [--workers N] [--config FILE] [--section.field value …]

tokenises the text of `data.source` in N processes, by default one per CPU, and cuts it into windows. The other flags
are those of `train.py`, which finds the corpus by the same `data` and `tokenizer` settings. If the command was stopped,
run it again to continue.

    batch --workdir DIR --position N

prints the windows of the batch at position N of a run's data, from 0, as text. `spikes.jsonl` lists the batches at
which the loss spiked, and `train.skip_batches` skips them.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokmat_jax.commands.flags import parse, parse_config
from tokmat_jax.data.corpus import corpus_of_run, prepare
from tokmat_jax.data.loader import train_batches
from tokmat_jax.errors import UserError
from tokmat_jax.output import stop_unless_read
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.view.terminal import visible


def _cpus() -> int:
    """Number of CPUs that this process may use; all CPUs if the system does not say, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Prepare:
    """Flags of `prepare` besides those of a config."""

    workers: int = field(default_factory=_cpus)
    """Number of processes that tokenise and write; with 1, this process does the work."""


def run_prepare(args: Sequence[str]) -> None:
    """Prepares the corpus and prints its figures."""
    begin = time.monotonic()
    own, rest = _split(args)
    workers = parse(Prepare, own).workers
    if workers < 1:
        raise UserError(f"--workers must be at least 1, found {workers}")
    config = parse_config(rest)
    corpus = prepare(config, workers)
    facts = corpus.facts
    print(f"corpus {corpus.folder}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, vocabulary "
          f"{corpus.tokenizer.vocab_size:,}; {facts['train_windows']:,} windows of {facts['seq_len']} to train on, "
          f"{facts['validation_windows']:,} held out; {time.monotonic() - begin:.0f} s")


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits `args` into the words of `--workers` and all others."""
    own, rest, words = [], [], iter(args)
    for word in words:
        if word == "--workers":
            own += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.startswith("--workers="):
            own.append(word)
        else:
            rest.append(word)
    return own, rest


_MOST = 2**40


@dataclass(frozen=True)
class Batch:
    """Flags of `batch`."""

    workdir: str
    """Folder of the run."""
    position: int
    """Position of the batch: the number of batches before it."""


def run_batch(args: Sequence[str]) -> None:
    """Prints one batch of a run, with a header line before each window."""
    asked = parse(Batch, args, description="The windows of a batch, as text.", prog="python -m tokmat_jax data batch")
    if not 0 <= asked.position < _MOST:
        raise UserError(f"--position must lie in 0..{_MOST - 1:,}, found {asked.position}")
    config = load_config(Path(asked.workdir))
    corpus = corpus_of_run(config, Path(asked.workdir))
    batches = train_batches(corpus.windows("train"), config.train.batch_size, config.train.seed)
    batches.seek(asked.position)
    for number, ids in enumerate(next(batches), 1):
        print(f"--- batch {asked.position}, window {number} of {config.train.batch_size}")
        print(visible(corpus.tokenizer.decode(ids.tolist())))
        stop_unless_read()


def main(args: Sequence[str]) -> None:
    """Runs the command named by the first of `args`."""
    if not args:
        raise UserError("no command given; there are prepare and batch")
    if args[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    if args[0] == "batch":
        run_batch(args[1:])
        return
    if args[0] != "prepare":
        raise UserError(f"unknown command {args[0]!r}; there are prepare and batch")
    if set(args[1:]) & {"-h", "--help"}:
        print(__doc__)
    run_prepare(args[1:])
