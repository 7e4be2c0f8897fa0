"""A corpus on disk: packed windows of T ids as an ArrayRecord TFDS dataset, its tokenizer and its facts.

    <prepared_dir>/<name>-<fingerprint>/
      corpus.json     what it was made from, and counts
      tokenizer/      see `tokenizer.py`
      unigram.npy     share of each token in the training split [V], float32
      windows/        TFDS dataset, splits `train` and `validation`, feature `tokens` int32 [T]

It is made once: another run with the same text and settings finds it by its fingerprint. It appears under its name
only when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.config import Config, DataConfig, TokenizerConfig
from tokmat_jax.data import sources
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.view.progress import Bar, bar
from tokmat_jax.workdir import TOKENIZER

_FORMAT = 2
_FACTS = "corpus.json"
_BATCH = 256


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

        builder: Any = tfds.builder_from_directory(self.folder / "windows")
        return builder.as_data_source(split=split)


def prepare(config: Config) -> Corpus:
    """The corpus of `config.data` and `config.tokenizer`, made now or found.

    Raises UserError where the source cannot be read or is shorter than two windows, one to train on and one held out.
    """
    kind, _, rest = config.data.source.partition(":")
    if kind == "tfds" and (Path(rest) / _FACTS).is_file():
        return _load(Path(rest), config.data)
    names = ("source", "text_field", "separator", "seq_len", "holdout", "tfds_data_dir")
    made_from = {
        "format": _FORMAT,
        "data": {name: getattr(config.data, name) for name in names},
        "tokenizer": _identity(config.tokenizer),
        "source": sources.identity(config.data),
    }
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[-40:]
    folder = Path(config.data.prepared_dir) / f"{name}-{fingerprint}"
    if (folder / _FACTS).is_file():
        return _load(folder, config.data)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"data.prepared_dir: cannot write into {folder.parent}: {error.strerror}") from None
    try:
        _make(unfinished, config, made_from | {"fingerprint": fingerprint})
        with contextlib.suppress(OSError):  # another run made the same corpus meanwhile: its one is taken
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _load(folder, config.data)


def _identity(config: TokenizerConfig) -> dict[str, Any]:
    """What tells one tokenizer from another. A workdir's is known by what its files hold, wherever they lie."""
    made_from = dataclasses.asdict(config)
    if config.kind == "workdir":
        files = sorted((Path(made_from.pop("name")) / TOKENIZER).glob("*"))
        made_from["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    elif config.name:
        made_from["files"] = sources.states(Path(config.name).glob("*"))
    return made_from


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


def _make(folder: Path, config: Config, made_from: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(config.tokenizer, _training_texts(config))
    tokenizer.save(folder / "tokenizer")
    with bar("tokenising") as progress:
        num_documents = _tokenise(folder, tokenizer, config, progress)
    train, held_out = _read_ids(folder / "train.ids"), _read_ids(folder / "validation.ids")
    train, held_out, rule = _ensure_held_out(train, held_out, tokenizer.end_of_text, config.data)
    windows = {"train": _windows(train, config.data.seq_len), "validation": _windows(held_out, config.data.seq_len)}
    _write(folder / "windows", windows)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for begin in range(0, len(windows["train"]), _BATCH):
        block = windows["train"][begin : begin + _BATCH].reshape(-1)
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
    np.save(folder / "unigram.npy", (counts / counts.sum()).astype(np.float32))
    for split in ("train", "validation"):
        (folder / f"{split}.ids").unlink()
    facts = {
        **made_from, "seq_len": config.data.seq_len, "documents": num_documents,
        "tokens": int(train.size + held_out.size), "held_out_by": rule, "vocab_size": tokenizer.vocab_size,
        "train_windows": len(windows["train"]), "validation_windows": len(windows["validation"]),
    }
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")


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


def _tokenise(folder: Path, tokenizer: Tokenizer, config: Config, progress: Bar) -> int:
    documents = sources.documents(config.data)
    num_documents, num_tokens = 0, 0
    with (folder / "train.ids").open("wb") as train, (folder / "validation.ids").open("wb") as validation:
        while batch := list(itertools.islice(documents, _BATCH)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                out = validation if is_held_out(text, config.data.holdout) else train
                document = np.array([tokenizer.end_of_text, *tokenizer.prefix, *ids], np.int32)
                document.tofile(out)
                num_tokens += document.size
            num_documents += len(batch)
            progress.update(num_tokens, f"tokens, {num_documents:,} documents")
    return num_documents


def _read_ids(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)


def _ensure_held_out(
    train: np.ndarray, held_out: np.ndarray, end_of_text: int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray, str]:
    """Both splits with at least one window; a corpus of few documents gives its last ones, or its end."""
    window, total = config.seq_len, train.size + held_out.size
    if total < 2 * window:
        raise UserError(f"data.source {config.source!r} has {total} tokens, fewer than two windows of {window} (one to "
                        f"train on, one held out): give more text or a smaller --data.seq-len")
    if held_out.size >= window and train.size >= window:
        return train, held_out, "hash of the document"
    everything = np.concatenate([train, held_out])
    latest = max(window, total - max(window, int(config.holdout * total)))
    starts = np.flatnonzero(everything == end_of_text)
    starts = starts[(starts >= window) & (starts <= latest)]
    cut, rule = (int(starts[-1]), "last documents") if starts.size else (latest, "end of the only document")
    return everything[:cut], everything[cut:], rule


def _windows(ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Windows [N, T] of a stream of ids; a remainder shorter than a window is dropped."""
    return ids[: ids.size // seq_len * seq_len].reshape(-1, seq_len)


def _write(folder: Path, windows: dict[str, np.ndarray]) -> None:
    import tensorflow_datasets as tfds

    class PackedWindows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            tokens = tfds.features.Tensor(shape=windows["train"].shape[1:], dtype=np.int32)
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"tokens": tokens}), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> Any:  # noqa: ARG002
            return {split: self._generate_examples(split) for split in windows}

        def _generate_examples(self, split: str) -> Any:
            with bar(f"writing {split} windows", len(windows[split])) as progress:
                for index, row in enumerate(windows[split]):
                    yield index, {"tokens": row}
                    progress.update(index + 1)

    tfds.disable_progress_bar()
    builder = PackedWindows(data_dir=str(folder.parent / "tfds"), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    Path(builder.data_dir).rename(folder)
    shutil.rmtree(folder.parent / "tfds")
