"""A corpus on disk: packed windows of T ids as an ArrayRecord TFDS dataset, its tokenizer and its facts.

    <prepared_dir>/<name>-<fingerprint>/
      corpus.json     what it was made from, and counts
      tokenizer/      see `tokenizer.py`
      unigram.npy     share of each token in the training split [V], float32
      windows/        TFDS dataset, splits `train` and `validation`, feature `tokens` int32 [T]

It is made once (see `making.py`): another run with the same text and settings finds it by its fingerprint, wherever the
text lies. Beside it is `known-files.jsonl` (see `content.py`). It appears under its name only when it is complete.
Until then there is a folder beside it, from which a run that was stopped goes on:

    <prepared_dir>/unfinished-<fingerprint>/
      plan.json       what it is made from, and the units of the source
      tokenizer/
      units/          ids and counts of every unit, see `tokenising.py`

Units are read, and windows written, by several processes if that is wished; what they write depends on the text alone.
Nothing is held in memory that grows with the corpus.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.config import Config, DataConfig
from tokmat_jax.data.identity import FORMER, former_fingerprint, identify
from tokmat_jax.data.making import FACTS, UNIGRAM, WINDOWS, make
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.errors import UserError, refusal, shown
from tokmat_jax.storage.files import lock, read_json
from tokmat_jax.storage.workdir import TOKENIZER, differences, known_corpus, load_config

_UNFINISHED = "unfinished-"


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
        return np.load(self.folder / UNIGRAM)

    def windows(self, split: str) -> Any:
        """Random access to the windows of `train` or `validation`: records {"tokens": int32 [T]}."""
        import tensorflow_datasets as tfds

        # TFDS takes a leading ~ for the home folder.
        builder: Any = tfds.builder_from_directory((self.folder / WINDOWS).absolute())
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
    return Path(rest) if kind == "tfds" and (Path(rest) / FACTS).is_file() else None


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
            make(unfinished, config, made_from, workers)
            unfinished.rename(folder)
    except OSError as error:
        raise refusal(error, f"data.prepared_dir: cannot write into {folder.parent}", folder.parent) from None
    return _load(folder, config.data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While it lasts no other process holds the lock of this file, which a process that dies gives back."""
    file = lock(path, lambda _: print("waiting for another process, which prepares the same corpus", file=sys.stderr,
                                      flush=True))
    try:
        yield
    finally:
        path.unlink()
        file.close()


def _load(folder: Path, config: DataConfig) -> Corpus:
    try:
        facts = read_json(folder / FACTS)
        found = facts["seq_len"]
    except (UserError, KeyError):
        raise UserError(f"{folder / FACTS} is damaged: delete {folder}, and it is prepared again") from None
    if found != config.seq_len:
        raise UserError(f"{folder} holds windows of {found} tokens, data.seq_len is {config.seq_len}: "
                        f"set --data.seq-len {found} or prepare another corpus")
    return Corpus(folder, load_tokenizer(folder / TOKENIZER), facts)
