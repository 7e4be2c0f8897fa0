"""The rows of a Parquet file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokmat_jax.data.sources import records
from tokmat_jax.data.sources.records import Unit, listed, record_text
from tokmat_jax.errors import UserError

SUFFIX = ".parquet"
_BUFFER = 1 << 20
_MOST_ROWS = 256
_AT_ONCE = 2 * records.LONGEST
"""Limit in bytes on the rows read at once, if all of them were the longest text of their dictionary."""
_UNIT_BYTES = 64 << 20


def units(path: Path, field: str) -> Iterator[Unit]:
    """Units of about 64 MB of the file, in whole row groups.

    Raises UserError if there is no `field`; if the file is damaged, raises the library's error.
    """
    with _open(path, field) as table:
        # Sizes are estimated from row counts. The metadata on a column's bytes are not read: if they are damaged, the
        # library ends the process.
        facts, begin, rows = table.metadata, 0, 0
        for group in range(facts.num_row_groups):
            rows += facts.row_group(group).num_rows
            if rows * path.stat().st_size >= _UNIT_BYTES * facts.num_rows or group + 1 == facts.num_row_groups:
                yield Unit(str(path), begin, group + 1)
                begin, rows = group + 1, 0


def texts(path: Path, field: str, part: Unit) -> Iterator[str | None]:
    """The texts in the row groups of `part`, None for a null; raises as `units`, and if a value is not text."""
    with _open(path, field) as table:
        groups = range(table.metadata.num_row_groups)[part.begin : part.end]
        row = sum(table.metadata.row_group(group).num_rows for group in range(part.begin))
        for group in groups:
            size = _rows_at_once(path, group, field, table.schema_arrow.field(field).type)
            for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=[field]):
                for text in (value.as_py() for value in batch.column(0)):
                    yield record_text({field: text}, field, f"{path} record {row}")
                    row += 1


@contextlib.contextmanager
def _open(path: Path, field: str) -> Iterator[Any]:
    import pyarrow.parquet

    if (packed := path.suffix.lower()) != SUFFIX:
        raise UserError(f"{path}: Parquet compresses inside; unpack the outer {packed} first")
    # With a buffer, a column is read piece by piece: a row group may be as large as its file.
    # An absolute path is never read as an address, as `a:b/c` would be.
    with pyarrow.parquet.ParquetFile(path.absolute(), buffer_size=_BUFFER) as table:
        names = table.schema_arrow.names
        if field not in names:
            raise UserError(f"{path} has no field {field!r}, found: {listed(names)}; set --data.text-field")
        yield table


def _rows_at_once(path: Path, group: int, field: str, kind: Any) -> int:
    """Number of rows per batch. A text that many rows share is stored once, in a dictionary, but every row of a batch
    gets a copy."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        return 1
    with parquet.ParquetFile(path.absolute(), buffer_size=_BUFFER, read_dictionary=[field]) as table:
        first = next(table.iter_batches(batch_size=1, row_groups=[group], columns=[field]), None)
    if first is None or not pa.types.is_dictionary(first.column(0).type):
        return 1
    functions: Any = compute  # created at import time, so type checkers do not know them
    longest = functions.max(functions.binary_length(first.column(0).dictionary)).as_py() or 0
    return max(1, min(_MOST_ROWS, _AT_ONCE // max(1, longest)))
