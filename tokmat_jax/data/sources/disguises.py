"""Files that are not what their name says and would be learned as text; each error says what to do."""

from pathlib import Path
from typing import BinaryIO

from tokmat_jax.errors import UserError

HEAD = 1 << 16
"""Number of first bytes that are examined."""

_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "is a git-LFS pointer, not the file itself: run git lfs pull",
    b"/annex/objects/": "is a git-annex pointer, not the file itself: run git annex get",
}
_PACKED = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive",
}
_FORMATS = {
    b"%PDF-": "is a PDF document: extract its text first",
    b"PAR1\x15": "is Parquet: let its name end in .parquet",
    b"ARROW1\0": "is an Arrow file: convert it to Parquet or JSONL",
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_PAGES = (b"<!doctype html", b"<html")


def refuse_pointer(path: Path) -> None:
    """Raises UserError if the file at `path` is only a pointer to its content (git-LFS, git-annex)."""
    with path.open("rb") as stream:
        head = stream.read(100)
    for begin, what in _POINTERS.items():
        if head.startswith(begin):
            raise UserError(f"{path} {what}")


def refuse_disguise(path: Path, stream: BinaryIO, packed: str, separator: str | None) -> None:
    """Raises UserError if `stream`, the unpacked content of the file at `path`, is not text.

    `packed` is the suffix of the compression in its name. `separator` stands between the documents of a text and may
    have zero bytes; None for JSON lines, which must not be a web page.
    """
    head = stream.read(HEAD)
    inside = f"{path} holds" if packed else f"{path} is"
    for begin, suffix in _PACKED.items():
        if head.startswith(begin):
            raise _compressed(path, packed, suffix)
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        raise _compressed(path, packed, ".bz2")
    archive = "a tar archive" if head[257:262] == b"ustar" else next(
        (what for begin, what in _ARCHIVES.items() if head.startswith(begin)), None)
    if archive:
        raise UserError(f"{inside} {archive}: unpack it, and name the files that were in it")
    for begin, what in _FORMATS.items():
        if head.startswith(begin):
            raise UserError(f"{path} {what}")
    if head.startswith(_UTF_16):
        raise UserError(f"{path} is UTF-16, not UTF-8: convert it, as with iconv -f UTF-16 -t UTF-8")
    if 10 * head.count(0) > len(head) and "\0" not in (separator or ""):
        raise UserError(f"{path} is no UTF-8 text: {head.count(0):,} of its first {len(head):,} bytes are zero; "
                        f"convert it if it is UTF-16 or UTF-32 (iconv -t UTF-8), or leave it out")
    if separator is None and head.lstrip().lower().startswith(_PAGES):
        raise UserError(f"{path} is a web page, perhaps an error message: fetch the file again")


def _compressed(path: Path, packed: str, suffix: str) -> UserError:
    if path.suffix.lower() in (".tgz", ".tbz", ".tbz2", ".txz", ".tzst"):
        return UserError(f"{path} is a tar archive: unpack it, and name the files that were in it")
    if packed:
        return UserError(f"{path} is compressed twice: unpack the outer {packed} first")
    return UserError(f"{path} is compressed: let its name end in {suffix}")
