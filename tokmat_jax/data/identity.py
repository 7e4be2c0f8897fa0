"""What tells one corpus from another: the state of its text, how it is cut, and its tokenizer."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tokmat_jax.config import Config, TokenizerConfig
from tokmat_jax.data import sources
from tokmat_jax.workdir import TOKENIZER

_FORMAT = 2


def identify(config: Config) -> dict[str, Any]:
    """What the corpus of `config` is made from, as JSON data, and the `fingerprint` of it."""
    names = ("source", "text_field", "separator", "seq_len", "holdout", "tfds_data_dir")
    made_from = {
        "format": _FORMAT,
        "data": {name: getattr(config.data, name) for name in names},
        "tokenizer": _tokenizer(config.tokenizer),
        "source": sources.identity(config.data),
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return made_from | {"fingerprint": digest[:12]}


def _tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """What tells one tokenizer from another. A workdir's is known by what its files hold, wherever they lie."""
    made_from = dataclasses.asdict(config)
    if config.kind == "workdir":
        files = sorted((Path(made_from.pop("name")) / TOKENIZER).glob("*"))
        made_from["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    elif config.name:
        made_from["files"] = sources.states(Path(config.name).glob("*"))
    return made_from
