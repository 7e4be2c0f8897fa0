"""Small corpora: their text, their configs, and what is left of them on disk."""

import dataclasses
from pathlib import Path
from typing import Any

from tokmat_jax.config import Config, DataConfig, TokenizerConfig
from tokmat_jax.data.content import RECORD


def texts(count: int) -> list[str]:
    """Documents of different lengths."""
    return [f"document number {index} says {'x' * (1 + index % 7)}" for index in range(count)]


def _config(folder: Path, name: str, prepared: str, tokenizer: TokenizerConfig, **fields) -> Config:
    base = Config()
    data = DataConfig(source=f"files:{folder}/{name}", seq_len=16, prepared_dir=str(folder / prepared), **fields)
    return dataclasses.replace(base, data=data, tokenizer=tokenizer,
                               maturation=dataclasses.replace(base.maturation, max_tail_length=4))


def config_for(folder: Path, texts: list[str], **fields) -> Config:
    """A corpus of bytes from a file in `folder`, which is written here; `fields` are DataConfig's."""
    (folder / "corpus.txt").write_text("<|endoftext|>".join(texts))
    return _config(folder, "corpus.txt", "prepared", TokenizerConfig(kind="bytes"), **fields)


def config_of_files(folder: Path, name: str = "prepared", pattern: str = "*.*", **tokenizer) -> Config:
    """A corpus in the folder `name` from the files in `folder` that fit `pattern`."""
    settings: dict[str, Any] = {"vocab_size": 300, **tokenizer}
    return _config(folder, pattern, name, TokenizerConfig(**settings), holdout=0.2)


def left(folder: Path) -> list[Path]:
    """What lies in a folder of prepared corpora."""
    return [path for path in folder.iterdir() if path.name != RECORD]
