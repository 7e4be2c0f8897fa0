"""Units and the text of a record, for every kind of source."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokmat_jax.errors import UserError

MARK = "\ufeff"
"""The byte-order mark, which is not part of a text."""
LONGEST = 128 << 20
"""Limit on a document, in bytes of a line or characters of a text: a few kilobytes can unpack to any length."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that can be read by itself; the default is all of it."""

    file: str | None = None
    """Path of the file, None if the source has no files."""
    begin: int = 0
    """First row group of a Parquet file, or first record of a TFDS split."""
    end: int | None = None
    """The index after the last; None if the part ends with its file or its source."""


def record_text(record: Any, field: str, where: str) -> str | None:
    """The text of a record, None if it is null; raises UserError, naming `where`, if the record has no such text."""
    if not isinstance(record, dict) or field not in record:
        found = listed(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no field {field!r}, found: {found}; set --data.text-field")
    text = record[field]
    if text is None:
        return None
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: field {field!r} is not UTF-8 at byte {error.start}") from None
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text; set --data.text-field")
    if len(text) > LONGEST:
        raise too_long(where)
    # JSON can spell half of a surrogate pair, which is no character: it becomes a question mark.
    return text.encode("utf-8", "replace").decode("utf-8")


def listed(names: Iterable[Any]) -> str:
    """The first of some names from a file; control characters are escaped."""
    shown = [name if name.isprintable() else repr(name) for name in map(str, itertools.islice(names, 20))]
    return ", ".join(name[:80] for name in shown)


def too_long(where: str) -> UserError:
    """The error for a document at `where` that is too long."""
    return UserError(f"{where} is longer than {LONGEST >> 20} MB, the limit for one document: split it, or give the "
                     f"string between the documents of a text (--data.separator)")
