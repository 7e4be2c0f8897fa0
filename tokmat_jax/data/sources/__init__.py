"""Where text comes from: a stream of documents from a package, files or a TFDS dataset.

Sources are read lazily, so a corpus may be larger than memory. A source is divided into units, which several processes
can read at the same time.

`data.source` is KIND:REST. A kind is a module with the functions of `Source`, and a line in `_KINDS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tokmat_jax.config import DataConfig
from tokmat_jax.data.sources import files, package, tfds
from tokmat_jax.data.sources.records import MARK, Unit
from tokmat_jax.errors import UserError


class Source(Protocol):
    """A kind of source; `rest` is what follows the kind in `data.source`. All raise UserError."""

    def units(self, rest: str, config: DataConfig, /) -> list[Unit]:
        """The parts of the source, in the order of its documents."""
        ...

    def documents(self, rest: str, config: DataConfig, part: Unit, /) -> Iterator[str | None]:
        """The texts of `part`, None for a null."""
        ...

    def identity(self, rest: str, config: DataConfig, /) -> list[Any]:
        """JSON data that identifies its text, independent of where it is stored."""
        ...


_KINDS: dict[str, Source] = {"package": package, "files": files, "tfds": tfds}


def units(config: DataConfig) -> list[Unit]:
    """The parts of `config.source`, in the order of its documents.

    A part is a text file, about 64 MB of a Parquet file in whole row groups, some thousand records of a TFDS split, or
    a package. Raises UserError for an unknown source, no files, a damaged Parquet file or one without the text field,
    and a TFDS split that cannot be read.
    """
    source, rest = _source(config)
    return source.units(rest, config)


@dataclass
class Tally:
    """Counts made while documents are read."""

    nulls: int = 0
    """Number of records that were skipped because their text is null."""


def documents(config: DataConfig, unit: Unit | None = None, tally: Tally | None = None) -> Iterator[str]:
    """The documents of `unit`, or of all `config.source`, without surrounding white space, empty ones left out.

    Their order is fixed: one after the other, the `units` have the same documents as the source. Records whose text is
    null are skipped, and counted in `tally`. Raises UserError for an unknown source, a file that is missing, empty,
    damaged, not what its name says or not UTF-8 (with the byte's offset), and a record without the text field.
    """
    source, rest = _source(config)
    for text in source.documents(rest, config, unit or Unit()):
        if text is None:
            if tally is not None:
                tally.nulls += 1
        elif text := _trimmed(text):
            yield text


def _trimmed(text: str) -> str:
    text = text.strip()
    return text.lstrip(MARK).lstrip() if text.startswith(MARK) else text


def identity(config: DataConfig) -> list[Any]:
    """JSON data that identifies the text of `config.source`: its kind, and versions or digests.

    Raises UserError for an unknown source, and a file that is missing or cannot be read.
    """
    source, rest = _source(config)
    return [config.source.partition(":")[0], *source.identity(rest, config)]


def _source(config: DataConfig) -> tuple[Source, str]:
    kind, _, rest = config.source.partition(":")
    if kind not in _KINDS:
        raise UserError(f"data.source {config.source!r} is of no known kind: use package:NAME, files:GLOB or tfds:NAME")
    return _KINDS[kind], rest
