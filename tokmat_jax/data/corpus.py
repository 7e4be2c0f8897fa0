"""A corpus on disk: packed windows of T ids as an ArrayRecord TFDS dataset, its tokenizer and its facts.

    <prepared_dir>/<name>-<fingerprint>/
      corpus.json     what it was made from, and counts
      tokenizer/      see `tokenizer.py`
      unigram.npy     share of each token in the training split [V], float32
      windows/        TFDS dataset, splits `train` and `validation`, feature `tokens` int32 [T]

It is made once (see `making.py`): another run with the same text and settings finds it by its fingerprint, even if the
text has moved. Beside it is `known-files.jsonl` (see `content.py`). It appears under its name only when it is complete.
Until then, finished work is in a folder beside it, from which an interrupted run resumes:

    <prepared_dir>/unfinished-<fingerprint>/
      plan.json       what it is made from, and the units of the source
      tokenizer/
      units/          ids and counts of every unit, see `tokenising.py`

Several processes may read the units and write the windows; what they write depends on the text alone. Memory use does
not grow with the corpus.
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
from tokmat_jax.config.saved import differences
from tokmat_jax.data.identity import FORMER, former_fingerprint, identify
from tokmat_jax.data.making import FACTS, UNIGRAM, WINDOWS, make
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.errors import UserError, refusal, shown
from tokmat_jax.storage.files import lock, read_json
from tokmat_jax.storage.workdir import TOKENIZER, known_corpus, load_config

_UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """`documents`, `tokens`, `train_windows`, `validation_windows`, `seq_len`, `held_out_by`, and `fingerprint`, which
    identifies this corpus."""

    def unigram(self) -> np.ndarray:
        """Share of each token in the training split [V], float32."""
        return np.load(self.folder / UNIGRAM)

    def windows(self, split: str) -> Any:
        """Random access to the windows of `train` or `validation`: records {"tokens": int32 [T]}."""
        import tensorflow_datasets as tfds

        # TFDS would expand a leading ~ to the home folder.
        builder: Any = tfds.builder_from_directory((self.folder / WINDOWS).absolute())
        return builder.as_data_source(split=split)


def prepare(config: Config, workers: int = 1) -> Corpus:
    """Finds the corpus of `config.data` and `config.tokenizer`, or makes it with up to `workers` processes.

    The corpus does not depend on their number. If several runs need the same corpus, one makes it and the others wait.
    Work that an interrupted run has finished is not repeated. Raises UserError if the source cannot be read or is
    shorter than two windows, one to train on and one held out, if `prepared_dir` cannot be written, or if a worker
    dies. If there is a run already, use `corpus_of_run`.
    """
    return _load(folder, config.data) if (folder := _given(config.data)) else _found_or_made(
        config, identify(config), workers)


def corpus_of_run(config: Config, workdir: Path) -> Corpus:
    """The corpus that the run in `workdir` was trained on; `config` is the run's, or the one it resumes with.

    As `prepare`, but raises UserError if `config` describes a different corpus, which is then not made, or if the
    corpus's tokenizer gives other ids than the run's.
    """
    known = known_corpus(workdir)
    if folder := _given(config.data):
        corpus = _load(folder, config.data)
        _refuse_other(known, corpus.facts["fingerprint"], config, workdir)
    else:
        made_from = identify(config)
        if known.get("format") == FORMER and known["fingerprint"] == (former := former_fingerprint(config)):
            # From a version that identified files by path, size and time, and read them a little differently.
            folder = _find(config.data, former)
        else:
            _refuse_other(known, made_from["fingerprint"], config, workdir)
        corpus = _load(folder, config.data) if folder else _found_or_made(config, made_from)
    for name in ("documents", "tokens", "train_windows", "validation_windows"):
        if known.get(name, corpus.facts[name]) != corpus.facts[name]:
            raise UserError(f"{workdir} was trained on a corpus of {shown(known[name])} {name.replace('_', ' ')}, but "
                            f"the same files now give {corpus.facts[name]:,}: choose another --workdir")
    _refuse_other_ids(corpus, workdir)
    return corpus


def _refuse_other(known: dict[str, Any], fingerprint: str, config: Config, workdir: Path) -> None:
    if known["fingerprint"] == fingerprint:
        return
    changed = [f"{name} was {before!r}, now {after!r}; " for name, (before, after) in
               differences(load_config(workdir), config).items() if name in ("data.source", "tokenizer.name")]
    older = "; an older version recorded their paths, sizes and times, which count too" * (
        known.get("format") == FORMER)
    raise UserError(f"{workdir} was trained on a different version of this corpus ({''.join(changed)}fingerprint "
                    f"{shown(known['fingerprint'])}, now {fingerprint}): restore its text and tokenizer{older}, or "
                    f"choose another --workdir")


def _refuse_other_ids(corpus: Corpus, workdir: Path) -> None:
    try:
        tokenizer = load_tokenizer(workdir / TOKENIZER)
    except UserError:  # a run that was killed while it wrote its tokenizer writes it again
        return
    if not tokenizer.same_ids(corpus.tokenizer):
        raise UserError(f"the tokenizer of {corpus.folder} gives other ids than the one that {workdir} was trained "
                        f"with: restore that tokenizer, or choose another --workdir")


def _given(config: DataConfig) -> Path | None:
    """The folder of a prepared corpus, if that is the source."""
    kind, _, rest = config.source.partition(":")
    return Path(rest) if kind == "tfds" and (Path(rest) / FACTS).is_file() else None


def _find(config: DataConfig, fingerprint: str) -> Path | None:
    """The finished corpus with this fingerprint. Its name begins with the source that it was made from."""
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
            # The run that was waited for may have made it, named after another location of the same text.
            if made := _find(config.data, fingerprint):
                return _load(made, config.data)
            make(unfinished, config, made_from, workers)
            unfinished.rename(folder)
    except OSError as error:
        raise refusal(error, f"data.prepared_dir: cannot write into {folder.parent}", folder.parent) from None
    return _load(folder, config.data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of this file during the block; a process that dies releases it."""
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
