"""`python -m tokmat_jax data`: corpora at scale.

    prepare [--workers N] [--config FILE] [--section.field value …]

tokenises the text of `data.source` in N processes, by default one per CPU, and cuts it into windows. The other flags
are those of `train.py`, which finds the corpus by the same `data` and `tokenizer` settings. If the command was stopped,
run it again to continue.

    batch --workdir DIR --position N

prints the windows of the batch at position N of a run's data, from 0, as text. `spikes.jsonl` lists the batches at
which the loss spiked, and `train.skip_batches` skips them.

    own --workdir DIR --output FILE.jsonl [--texts N]

lets a language model write texts of its own, on which a tail in front of it learns what it will say. If the command was
stopped, run it again to continue.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokmat_jax.commands.flags import flag_of, parse, parse_config
from tokmat_jax.data.corpus import corpus_of_run, prepare
from tokmat_jax.data.loader import train_batches
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.generation.baselines import Baselines
from tokmat_jax.generation.generator import Generator
from tokmat_jax.output import stop_unless_read
from tokmat_jax.progress import bar
from tokmat_jax.storage.files import write_whole
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


_AT_ONCE = 32
"""Texts that are written at a time."""


@dataclass(frozen=True)
class Own:
    """Flags of `own`."""

    workdir: str
    """Folder of the language model: an import, or a run with --objective.kind ar."""
    output: str
    """JSONL file to write; texts that it has already are kept."""
    texts: int = 1000
    """Number of texts."""
    drawn_tokens: int = 16
    """Number of tokens at the beginning of a text that are drawn (temperature 1, top-p 0.95), so that texts differ."""
    greedy_tokens: int = 112
    """Number of tokens after them, all of which are the likeliest."""
    seed: int = 0
    """Seed of the draws."""


def run_own(args: Sequence[str]) -> None:
    """Writes the texts, batch by batch."""
    asked = parse(Own, args, description="Texts that a language model writes.", prog="python -m tokmat_jax data own")
    for name in ("texts", "drawn_tokens", "greedy_tokens"):
        if getattr(asked, name) < 1:
            raise UserError(f"{flag_of(name)} must be at least 1, found {getattr(asked, name)}")
    generator = Generator.from_workdir(asked.workdir)
    model, path = Baselines(generator), Path(asked.output)
    try:
        done = _whole_lines(path)
        with path.open("a", encoding="utf-8") as file, bar("writing", asked.texts, done) as progress:
            while done < asked.texts:
                for text in own_texts(model, asked, done):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                file.flush()
                done = min(done - done % _AT_ONCE + _AT_ONCE, asked.texts)
                progress.update(done, "texts")
    except OSError as error:
        raise UserError(f"--output: cannot use {path}: {one_line(error)}") from None
    print(f"{path}: {done:,} texts")


def own_texts(model: Baselines, asked: Own, first: int) -> list[str]:
    """The texts from number `first` on, at most a batch of them, each up to its end-of-text; a text depends on its
    number and the seed alone."""
    tokenizer, begin = model.generator.tokenizer, first - first % _AT_ONCE
    start, count = [*tokenizer.prefix] or [tokenizer.end_of_text], min(_AT_ONCE, asked.texts - begin)
    drawn = [one.tokens for one in model.sample([start], asked.drawn_tokens, temperature=1.0, top_p=0.95,
                                                num_samples=count, seed=asked.seed + begin)][first - begin :]
    told = model.sample([[*start, *tokens] for tokens in drawn], asked.greedy_tokens)
    whole = [[*tokens, *more.tokens, tokenizer.end_of_text] for tokens, more in zip(drawn, told, strict=True)]
    return [tokenizer.decode(ids[: ids.index(tokenizer.end_of_text)]) for ids in whole]


def _whole_lines(path: Path) -> int:
    """Number of lines in `path`, 0 if there is no file. What a killed process left of a line is removed."""
    if not path.exists():
        return 0
    found = path.read_bytes()
    whole = found[: found.rfind(b"\n") + 1]
    if whole != found:
        write_whole(path, whole)
    return whole.count(b"\n")


def main(args: Sequence[str]) -> None:
    """Runs the command named by the first of `args`."""
    if not args:
        raise UserError("no command given; there are prepare, batch and own")
    if args[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    if args[0] == "batch":
        run_batch(args[1:])
        return
    if args[0] == "own":
        run_own(args[1:])
        return
    if args[0] != "prepare":
        raise UserError(f"unknown command {args[0]!r}; there are prepare, batch and own")
    if set(args[1:]) & {"-h", "--help"}:
        print(__doc__)
    run_prepare(args[1:])
