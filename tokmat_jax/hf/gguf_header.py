"""The header of a GGUF file. Every count and length in it is checked against the file's size before it is used.

Metadata by name, then the place of each weight (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Format characters of `struct` by the number of a type."""
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 1 << 22
"""Limit on the values in all arrays together; each becomes a Python object. A tokenizer has some hundred thousand."""
_MOST_AXES = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class Place:
    """Location of a weight."""

    name: str
    kind: int
    """Number of its type."""
    shape: tuple[int, ...]
    """The innermost axis comes first."""
    begin: int
    """First byte in the file."""


def read_header(file: Path) -> tuple[dict[str, Any], list[Place]]:
    """Metadata and places of a GGUF file; raises ValueError if it is not one, and OSError if it cannot be read."""
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("GGUF magic invalid")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(content, len(_MAGIC)).header()


class _Cursor:
    """Reads `content` from byte `begin` on."""

    def __init__(self, content: mmap.mmap, begin: int):
        self._content, self._at, self._num_values = content, begin, 0

    def header(self) -> tuple[dict[str, Any], list[Place]]:
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, known are 2 and 3 in little-endian order")
        num_weights, num_facts = self._scalar("Q"), self._scalar("Q")
        facts: dict[str, Any] = {}
        # If a count is too large, reading fails at the end of the file at the latest.
        for _ in range(num_facts):
            name = self._string()
            if name in facts:
                raise ValueError(f"{name!r} occurs in it twice")
            facts[name] = self._value(self._scalar("I"))
        weights = [self._place() for _ in range(num_weights)]
        alignment = facts.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        begin = -(-self._at // alignment) * alignment
        if len({weight.name for weight in weights}) < len(weights):
            raise ValueError("two weights have the same name")
        return facts, [Place(one.name, one.kind, one.shape, begin + one.begin) for one in weights]

    def _take(self, size: int) -> int:
        """Position of the next byte; moves on by `size` bytes."""
        begin = self._at
        if size > len(self._content) - begin:
            raise ValueError(f"{size:,} bytes are announced at byte {begin:,} of {len(self._content):,}")
        self._at += size
        return begin

    def _scalar(self, letter: str) -> Any:
        return struct.unpack_from(f"<{letter}", self._content, self._take(struct.calcsize(letter)))[0]

    def _string(self, errors: str = "strict") -> str:
        size = self._scalar("Q")
        begin = self._take(size)
        return self._content[begin : begin + size].decode("utf-8", errors)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string("replace")
        if kind == _ARRAY:
            return self._array(self._scalar("I"), self._scalar("Q"))
        return self._scalar(self._letter(kind))

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value is of the unknown type {kind}")
        return _SCALARS[kind]

    def _array(self, kind: int, length: int) -> list[Any]:
        self._num_values += length
        if self._num_values > _MOST_VALUES:
            raise ValueError(f"its arrays have {self._num_values:,} values, more than {_MOST_VALUES:,}")
        if kind == _STRING:
            return [self._string("replace") for _ in range(length)]
        letter = self._letter(kind)
        begin = self._take(length * struct.calcsize(letter))
        return list(struct.unpack_from(f"<{length}{letter}", self._content, begin))

    def _place(self) -> Place:
        name, num_axes = self._string(), self._scalar("I")
        if not name.isprintable():
            raise ValueError(f"a weight is called {name!r}")
        if not 1 <= num_axes <= _MOST_AXES:
            raise ValueError(f"{name} has {num_axes} axes, not 1 to {_MOST_AXES}")
        shape = tuple(self._scalar("Q") for _ in range(num_axes))
        return Place(name, self._scalar("I"), shape, self._scalar("Q"))

