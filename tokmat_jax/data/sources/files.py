"""The documents of files: text, JSON lines or Parquet, compressed or not.

Every error names the file.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tokmat_jax.config import DataConfig
from tokmat_jax.data.content import digests
from tokmat_jax.data.sources import parquet, records
from tokmat_jax.data.sources.disguises import refuse_disguise, refuse_pointer
from tokmat_jax.data.sources.patterns import find_files
from tokmat_jax.data.sources.records import MARK, Unit, record_text, too_long
from tokmat_jax.errors import UserError, one_line

_CHUNK = 1 << 20
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
_JSON_LINES = (".jsonl", ".ndjson", ".json")


def units(patterns: str, config: DataConfig) -> list[Unit]:
    """Text files, and parts of Parquet files.

    Raises UserError if there are no files, and for a Parquet file that is damaged or has no text field.
    """
    return [unit for path in find_files(patterns) for unit in _units_of(path, config.text_field)]


def documents(patterns: str, config: DataConfig, part: Unit) -> Iterator[str | None]:
    """The texts of the file of `part`, or of all files, None for a null.

    Raises UserError for a file that is missing, empty, damaged, not what its name says or not UTF-8 (with the byte's
    offset), and a record without the text field.
    """
    paths = find_files(patterns) if part.file is None else [Path(part.file)]
    return (text for path in paths for text in _texts_of(path, config, part))


def identity(patterns: str, config: DataConfig) -> list[Any]:
    """(how it is read, digest of its content) of each file, in their order."""
    paths = find_files(patterns)
    return [*zip(map(_way_to_read, paths), digests(paths, Path(config.prepared_dir)), strict=True)]


def _way_to_read(path: Path) -> str:
    """How the file at `path` is read; this and its content identify it."""
    inner, packed = _kind(path)
    form = "Parquet" if inner == parquet.SUFFIX else "JSON lines" if inner in _JSON_LINES else "text"
    return f"{form}, {packed}" if packed else form


def _kind(path: Path) -> tuple[str, str]:
    """Suffix of a file's content, and of the compression around it, "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (*_OPENERS, ".zst") else ""
    return suffixes[-1] if suffixes else "", packed


def _units_of(path: Path, field: str) -> Iterator[Unit]:
    if _kind(path)[0] != parquet.SUFFIX:
        yield Unit(str(path))
        return
    with _named(path):
        yield from parquet.units(path, field)


def _texts_of(path: Path, config: DataConfig, part: Unit) -> Iterator[str | None]:
    inner, packed = _kind(path)
    with _named(path):
        if inner == parquet.SUFFIX:
            yield from parquet.texts(path, config.text_field, part)
            return
        with _open(path, packed) as stream:
            refuse_disguise(path, stream, packed, None if inner in _JSON_LINES else config.separator)
        with _open(path, packed) as stream:
            if inner in _JSON_LINES:
                yield from _json_lines(path, stream, config.text_field)
            else:
                yield from _plain(path, stream, config.separator)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors in the block into a UserError that names `path`."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        refuse_pointer(path)
        yield
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, _DAMAGE) or _is_foreign(error)):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


def _is_foreign(error: Exception) -> bool:
    """Whether `error` belongs to a library that is imported only when it is used."""
    return any(kind.__name__ in ("ZstdError", "ArrowException") for kind in type(error).__mro__)


@contextlib.contextmanager
def _open(path: Path, packed: str) -> Iterator[BinaryIO]:
    if packed == ".zst":
        import zstandard

        with path.open("rb") as raw:
            unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.BufferedReader(unpacked)  # pyright: ignore[reportArgumentType]
    else:
        with _OPENERS.get(packed, open)(path, "rb") as stream:
            yield stream  # pyright: ignore[reportReturnType]


def _decoded(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The text of `stream` in pieces, without byte-order marks, which are also in the middle if files were joined."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    while True:
        chunk = stream.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: byte {consumed - pending + error.start} is "
                            f"0x{error.object[error.start]:02x}; convert the file") from None
        consumed += len(chunk)
        yield text.replace(MARK, "")
        if not chunk:
            return


def _plain(path: Path, stream: BinaryIO, separator: str) -> Iterator[str]:
    # Pieces are joined once per document: adding them up one by one would be quadratic in a file of one document.
    pieces: list[str] = []
    overlap, length, number = "", 0, 1
    # A line may end in CRLF. The pattern is slow, so only a text that has one pays for it.
    any_end = re.compile(r"\r?\n".join(map(re.escape, separator.split("\n")))) if "\n" in separator else None
    keep = len(separator) - 1 + separator.count("\n")
    for piece in _decoded(path, stream):
        text = overlap + piece
        first, *others = any_end.split(text) if any_end and "\r" in text else text.split(separator)
        for other in others:
            yield "".join([*pieces, first])
            pieces, first, length, number = [], other, 0, number + 1
        cut = len(first) - keep if keep else len(first)
        cut = max(cut, 0)
        pieces.append(first[:cut])
        overlap = first[cut:]
        length += cut
        if length + len(overlap) > records.LONGEST:
            raise too_long(f"{path} document {number}")
    yield "".join([*pieces, overlap])


def _json_lines(path: Path, stream: BinaryIO, field: str) -> Iterator[str | None]:
    lines = iter(lambda: stream.readline(records.LONGEST + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > records.LONGEST:
            raise too_long(f"{path} line {number}")
        if not line.strip():
            continue
        try:
            record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number} is not UTF-8 at its byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {one_line(error)}; one object per line is "
                            f"expected") from None
        yield record_text(record, field, f"{path} line {number}")
