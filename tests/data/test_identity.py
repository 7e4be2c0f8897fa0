"""By what a corpus is known: what its files hold, wherever and whenever they were written."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from corpora import config_for, texts
from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data import content, making
from tokmat_jax.data.corpus import corpus_of_run, prepare
from tokmat_jax.data.identity import FORMER, former_fingerprint, identify
from tokmat_jax.data.tokenizer import train_bpe
from tokmat_jax.errors import UserError
from tokmat_jax.storage.workdir import save_config


def from_files(folder):
    return config_for(folder, texts(40), holdout=0.2)


def from_dataset(folder):
    base = from_files(folder)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, source=f"tfds:{folder}"))


def with_hub_folder(folder):
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "tokenizer.json").write_text("{}")
    return dataclasses.replace(from_files(folder), tokenizer=TokenizerConfig("huggingface", name=str(folder / "hub")))


def with_workdir(folder):
    train_bpe(["the cat"], 260).save(folder / "run" / "tokenizer")
    return dataclasses.replace(from_files(folder), tokenizer=TokenizerConfig("workdir", name=str(folder / "run")))


def moved(config, before, after):
    """`config` with everything that lies in `before` in `after`."""
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=config.data.source.replace(before, after)),
        tokenizer=dataclasses.replace(config.tokenizer, name=config.tokenizer.name.replace(before, after)))


def fingerprint(config):
    return identify(config)["fingerprint"]


@pytest.mark.parametrize(("make", "counts"), [
    (from_files, "corpus.txt"), (from_dataset, "corpus.txt"), (with_hub_folder, "hub/tokenizer.json"),
    (with_workdir, "run/tokenizer/tokenizer.json")])
def test_what_the_files_hold_is_what_counts(tmp_path, monkeypatch, make, counts):
    here = tmp_path / "here"
    here.mkdir()
    config = make(here)
    known = fingerprint(config)
    os.utime(here / counts, (1, 1))
    assert fingerprint(config) == known
    shutil.copytree(here, tmp_path / "there")
    assert fingerprint(moved(config, str(here), str(tmp_path / "there"))) == known
    monkeypatch.chdir(tmp_path)
    assert fingerprint(moved(config, str(here), "here")) == known
    same_size = (here / counts).read_bytes()[::-1]
    (here / counts).write_bytes(same_size)
    os.utime(here / counts, (1, 1))
    assert fingerprint(config) != known


def test_the_order_of_files_and_how_they_are_read_count(tmp_path):
    config = from_files(tmp_path)
    (tmp_path / "b.txt").write_text("other")
    shutil.copy(tmp_path / "b.txt", tmp_path / "b.jsonl")
    names = ("corpus.txt,b.txt", "b.txt,corpus.txt", "corpus.txt,b.jsonl")
    found = {fingerprint(dataclasses.replace(config, data=dataclasses.replace(
        config.data, source="files:" + ",".join(f"{tmp_path}/{name}" for name in each.split(","))))) for each in names}
    assert len(found) == 3


def test_a_corpus_is_found_from_another_place_of_its_text(tmp_path, monkeypatch):
    config = from_files(tmp_path)
    first = prepare(config)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "corpus.txt", tmp_path / "elsewhere" / "other.text")
    monkeypatch.setattr("tokmat_jax.data.corpus.make", lambda *_: pytest.fail("prepared again"))
    data = dataclasses.replace(config.data, source=f"files:{tmp_path}/elsewhere/*.text")
    assert prepare(dataclasses.replace(config, data=data)).folder == first.folder


@pytest.fixture
def files(tmp_path):
    """Files that were written long ago."""
    found = [tmp_path / f"{index}.txt" for index in range(20)]
    for path in found:
        path.write_text(path.name)
    return found


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files whose content was read; their times are believed at once."""
    original, read = content._digest, []

    def noted(path, state):
        read.append(path.name)
        return original(path, state)

    monkeypatch.setattr(content, "_digest", noted)
    monkeypatch.setattr(content, "_SETTLED", 0)
    return read


def test_a_file_is_read_once_and_again_when_it_was_touched(tmp_path, files, hashed):
    want = content.digests(files, tmp_path / "prepared")
    assert len(set(want)) == len(hashed) == 20
    hashed.clear()
    os.utime(files[3], (1, 1))
    files[5].write_text("5.TXT")
    again = content.digests(files, tmp_path / "prepared")
    assert hashed == ["3.txt", "5.txt"]
    assert [index for index in range(20) if again[index] != want[index]] == [5]


def test_a_file_that_was_written_just_now_is_not_believed(tmp_path, files, hashed, monkeypatch):
    monkeypatch.setattr(content, "_SETTLED", 10**12)
    content.digests(files, tmp_path)
    content.digests(files, tmp_path)
    assert len(hashed) == 40


@pytest.mark.parametrize("damage", [
    lambda record: record.write_bytes(record.read_bytes().replace(b'"sha', b'"')[:-30]),
    lambda record: record.write_bytes(record.read_bytes().replace(b"a", b"b")),
    lambda record: record.write_bytes(os.urandom(3000)),
    lambda record: record.write_text('[[1]]\n["x"]\n3\nnull\n{"a": 1}\n' + "[" * 100_000),
    lambda record: (record.unlink(), record.mkdir()),
])
def test_a_damaged_record_means_reading_again(tmp_path, files, hashed, damage):
    want = content.digests(files, tmp_path / "prepared")
    damage(tmp_path / "prepared" / content.RECORD)
    assert content.digests(files, tmp_path / "prepared") == want
    hashed.clear()
    assert content.digests(files, tmp_path / "prepared") == want
    assert hashed == [] or (tmp_path / "prepared" / content.RECORD).is_dir()


def test_many_may_note_what_they_have_read_at_once(tmp_path, files, hashed):
    with ThreadPoolExecutor(8) as pool:
        want, *others = pool.map(lambda _: content.digests(files, tmp_path), range(8))
    assert others == [want] * 7
    hashed.clear()
    assert content.digests(files, tmp_path) == want
    assert hashed == []


@pytest.mark.parametrize("lost", ["corpus.txt", "run/tokenizer/tokenizer.json", "prepared/x"])
def test_what_the_system_refuses_is_blamed_on_the_file_it_refuses(tmp_path, monkeypatch, lost):
    config = with_workdir(tmp_path)
    original = making.make_tokenizer

    def late(*args):
        made = original(*args)
        if lost == "prepared/x":
            raise OSError(28, "No space left on device")
        (tmp_path / lost).unlink()
        return made

    if lost.startswith("run"):
        (tmp_path / lost).unlink()
    else:
        monkeypatch.setattr(making, "make_tokenizer", late)
    says = {"corpus.txt": r"corpus.txt cannot be read: No such file", "prepared/x": "cannot write into .*: No space"}
    with pytest.raises(UserError, match=says.get(lost, "no usable tokenizer in .*run")):
        prepare(config)


# Runs from before


@pytest.fixture
def former_run(tmp_path):
    """Config and workdir of a run whose corpus was known by path, size and time, and is gone."""
    config = from_files(tmp_path)
    os.utime(tmp_path / "corpus.txt", (1, 1))
    facts = prepare(config).facts
    shutil.rmtree(config.data.prepared_dir)
    save_config(config, tmp_path)
    (tmp_path / "corpus.json").write_text(
        json.dumps(facts | {"format": FORMER, "fingerprint": former_fingerprint(config)}))
    return config, tmp_path


def test_a_run_from_before_goes_on_if_its_files_are_as_they_were(former_run):
    config, workdir = former_run
    corpus = corpus_of_run(config, workdir)
    assert corpus.facts["fingerprint"] == fingerprint(config)
    # Its own corpus, if it is still there, goes before a new one.
    own = Path(config.data.prepared_dir) / f"whatever-{former_fingerprint(config)}"
    shutil.copytree(corpus.folder, own)
    assert corpus_of_run(config, workdir).folder == own


def test_a_run_from_before_is_refused_if_its_files_were_touched_or_give_another_corpus(former_run):
    config, workdir = former_run
    facts = json.loads((workdir / "corpus.json").read_text())
    (workdir / "corpus.json").write_text(json.dumps(facts | {"documents": 3}))
    with pytest.raises(UserError, match="was trained on a corpus of 3 documents, but the same files now give 40"):
        corpus_of_run(config, workdir)
    os.utime(workdir / "corpus.txt", (2, 2))
    with pytest.raises(UserError, match="an older version recorded their paths, sizes and times, which count too"):
        corpus_of_run(config, workdir)
