"""The identity of a corpus: its text, how it is cut, and its tokenizer, independent of where they are stored."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokmat_jax.config import Config, DataConfig, TokenizerConfig
from tokmat_jax.data import sources
from tokmat_jax.data.content import folder_digests, reading
from tokmat_jax.data.sources.package import version
from tokmat_jax.data.sources.patterns import find_files
from tokmat_jax.errors import UserError
from tokmat_jax.storage.files import read_json
from tokmat_jax.storage.workdir import CORPUS, TOKENIZER, load_config

_FORMAT = 3
FORMER = 2
"""The previous format, which identified files by path, size and time."""


def identify(config: Config) -> dict[str, Any]:
    """What the corpus of `config` is made from, as JSON data, with its `fingerprint`.

    Raises UserError if the source is unknown, or a file of it or of the tokenizer is missing or cannot be read.
    """
    made_from = {
        "format": _FORMAT,
        "data": {name: getattr(config.data, name) for name in ("text_field", "separator", "seq_len", "holdout")},
        "tokenizer": noted_tokenizer(config) or _tokenizer(config.tokenizer, Path(config.data.prepared_dir)),
        "source": sources.identity(config.data),
    }
    return made_from | {"fingerprint": _fingerprint(made_from)}


def _fingerprint(made_from: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def _tokenizer(config: TokenizerConfig, known_in: Path) -> dict[str, Any]:
    """A folder is identified by the content of its files, a tokenizer of a hub by its name."""
    made_from = dataclasses.asdict(config)
    if config.kind == "workdir":
        del made_from["name"]
        made_from["files"] = list(folder_digests(Path(config.name) / TOKENIZER, known_in).values())
    elif config.name and Path(config.name).is_dir():
        del made_from["name"]
        made_from["files"] = folder_digests(Path(config.name), known_in)
    return made_from


def noted_tokenizer(config: Config) -> dict[str, Any] | None:
    """What the run in `config.workdir` has recorded of its tokenizer, if the folder that it came from is gone."""
    workdir, named = Path(config.workdir), config.tokenizer
    if not named.name or (Path(named.name) / (TOKENIZER if named.kind == "workdir" else "")).is_dir():
        return None
    with contextlib.suppress(UserError):
        if load_config(workdir).tokenizer == named:
            return read_json(workdir / CORPUS).get("tokenizer")
    return None


def former_fingerprint(config: Config) -> str:
    """The fingerprint of `config` in the former format, which older runs still have.

    Raises UserError as `identify`.
    """
    names = ("source", "text_field", "separator", "seq_len", "holdout", "tfds_data_dir")
    tokenizer = dataclasses.asdict(config.tokenizer)
    if noted := noted_tokenizer(config):
        tokenizer = noted
    elif config.tokenizer.kind == "workdir":
        tokenizer = _tokenizer(config.tokenizer, Path(config.data.prepared_dir))
    elif config.tokenizer.name:
        tokenizer["files"] = _states(Path(config.tokenizer.name).glob("*"))
    return _fingerprint({"format": FORMER, "data": {name: getattr(config.data, name) for name in names},
                         "tokenizer": tokenizer, "source": _former_source(config.data)})


def _former_source(config: DataConfig) -> list[Any]:
    """The source in the former format. Kinds of sources that were added later never occur in it."""
    kind, _, rest = config.source.partition(":")
    if kind == "package" and (found := version(rest)) is not None:
        return [rest, found]
    if kind == "files":
        return _states(find_files(rest))
    if kind == "tfds" and (folder := Path(rest.partition("#")[0])).is_dir():
        return _states(folder.glob("*"))
    return [config.source]


def _states(paths: Iterable[Path]) -> list[Any]:
    """Name, size and modification time of each of `paths`, sorted."""
    found = []
    for path in paths:
        with reading(path):
            found.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return sorted(found)
