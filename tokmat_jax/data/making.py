"""Making a corpus: its tokenizer, the ids of every unit, then windows and facts from all units."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.config import Config, DataConfig
from tokmat_jax.data import sources
from tokmat_jax.data.identity import noted_tokenizer
from tokmat_jax.data.tokenising import SPLITS, UNITS, Counts, is_held_out, tokenise
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tokmat_jax.data.windows import Ids, last_of, write_windows
from tokmat_jax.errors import UserError
from tokmat_jax.progress import bar
from tokmat_jax.storage.files import UNFINISHED, read_json, write_json
from tokmat_jax.storage.workdir import TOKENIZER

FACTS, UNIGRAM, WINDOWS = "corpus.json", "unigram.npy", "windows"
_PLAN = "plan.json"


def make(folder: Path, config: Config, made_from: dict[str, Any], workers: int) -> None:
    """Fills `folder` with the corpus, starting from what is in it already; raises as `corpus.prepare`."""
    try:
        if not (folder / FACTS).is_file():
            _open_unfinished(folder, made_from, units := sources.units(config.data))
            tokenizer = _tokenizer(folder / TOKENIZER, config)
            counts = tokenise(folder, tokenizer, config.data, units, workers)
            _assemble(folder, tokenizer, config.data, counts, made_from, workers)
    except BaseException:
        if not any(folder.glob(f"{UNITS}/*.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder / UNITS, ignore_errors=True)
    (folder / _PLAN).unlink(missing_ok=True)


def _open_unfinished(folder: Path, made_from: dict[str, Any], units: Sequence[sources.Unit]) -> None:
    """Keeps what is in `folder` if it belongs to the same units of the same text; otherwise empties it."""
    # The order of the files matters, their location does not.
    plan = json.loads(json.dumps(made_from | {"units": [(unit.begin, unit.end) for unit in units]}))
    with contextlib.suppress(UserError):
        if read_json(folder / _PLAN) == plan:
            return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / UNITS).mkdir(parents=True)
    write_json(folder / _PLAN, plan)


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer in `folder`, which is made if it is missing; it appears there only when it is complete."""
    if not folder.exists():
        half = folder.with_name(f"{TOKENIZER}{UNFINISHED}")
        made = load_tokenizer(Path(config.workdir) / TOKENIZER) if noted_tokenizer(config) else make_tokenizer(
            config.tokenizer, _training_texts(config))
        made.save(half)
        half.rename(folder)
    return load_tokenizer(folder)


def _training_texts(config: Config) -> Iterator[str]:
    """Documents to train a tokenizer on: those that are not held out, or all if that leaves none."""
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


def _assemble(
    folder: Path, tokenizer: Tokenizer, data: DataConfig, counts: Sequence[Counts], made_from: dict[str, Any],
    workers: int,
) -> None:
    """Writes windows, unigram and facts from all units; after an interruption, this starts over."""
    total = sum(counts, Counts())
    for note in _notes(total, data.separator, made_from["source"]):
        print(f"note: {note}", file=sys.stderr)
    if total.tokens < 2 * data.seq_len:
        shutil.rmtree(folder / UNITS)  # not worth keeping
        raise UserError(f"data.source {data.source!r} has {total.tokens} tokens, fewer than two windows of "
                        f"{data.seq_len} (one to train on, one held out): give more text or a smaller --data.seq-len")
    train, held_out = (
        Ids(tuple((folder / UNITS / f"{index:06d}.{split}.ids", 0, getattr(unit, split))
                   for index, unit in enumerate(counts)))
        for split in SPLITS
    )
    train, held_out, rule = _ensure_held_out(train, held_out, tokenizer.end_of_text, data)
    unigram = write_windows(folder / WINDOWS, {"train": train, "validation": held_out}, data.seq_len,
                            tokenizer.vocab_size, workers)
    np.save(folder / UNIGRAM, unigram)
    write_json(folder / FACTS, {
        **made_from, "seq_len": data.seq_len, "documents": total.documents, "tokens": total.tokens,
        "nulls": total.nulls, "held_out_by": rule, "vocab_size": tokenizer.vocab_size,
        "train_windows": train.size // data.seq_len, "validation_windows": held_out.size // data.seq_len,
    })


def _notes(total: Counts, separator: str, source: list[Any]) -> Iterator[str]:
    """Notes on what may be unintended in a `source` (see `identify`) with these counts."""
    if total.nulls:
        yield f"{total.nulls:,} of {total.nulls + total.documents:,} records have null for their text: skipped"
    kind, *files = source
    are_text = kind == "files" and all(way.startswith("text") for way, _ in files)
    if are_text and separator != DataConfig().separator and total.documents <= len(files):
        hint = "; in a shell, write a line end as $'\\n', with the dollar" * ("\\" in separator)
        yield f"data.separator {separator!r} occurs in no file, each is one document{hint}"


def _ensure_held_out(train: Ids, held_out: Ids, end_of_text: int, config: DataConfig) -> tuple[Ids, Ids, str]:
    """Both splits with at least one window each, and the rule. If the hash leaves a split too short, the last documents
    are held out, or the end of the only document."""
    window, total = config.seq_len, train.size + held_out.size
    if held_out.size >= window and train.size >= window:
        return train, held_out, "hash of the document"
    everything = Ids(train.parts + held_out.parts)
    latest = max(window, total - max(window, int(config.holdout * total)))
    cut = last_of(end_of_text, everything, window, latest + 1)
    rule = "end of the only document" if cut is None else "last documents"
    cut = latest if cut is None else cut
    return everything.piece(0, cut), everything.piece(cut, total), rule
