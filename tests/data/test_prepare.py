import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import config_for, left, texts
from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data import making, tokenising
from tokmat_jax.data.corpus import prepare
from tokmat_jax.data.tokenising import is_held_out
from tokmat_jax.errors import UserError


def ids_of(corpus, split):
    windows = corpus.windows(split)
    return np.stack([windows[index]["tokens"] for index in range(len(windows))])


def test_every_document_is_packed_once_behind_end_of_text(tmp_path):
    config = config_for(tmp_path, texts(60), holdout=0.2)
    corpus = prepare(config)
    tokenizer = corpus.tokenizer
    want = {"train": [], "validation": []}
    for text in texts(60):
        split = "validation" if is_held_out(text, 0.2) else "train"
        want[split] += [tokenizer.end_of_text, *tokenizer.encode(text)]
    for split, stream in want.items():
        got = ids_of(corpus, split)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got.reshape(-1), stream[: len(stream) // 16 * 16])
    assert corpus.facts["documents"] == 60
    assert corpus.facts["train_windows"] == len(corpus.windows("train"))
    counts = np.bincount(ids_of(corpus, "train").reshape(-1), minlength=257)
    np.testing.assert_allclose(corpus.unigram(), counts / counts.sum(), rtol=1e-6)


def test_it_is_made_once_and_again_when_something_changed(tmp_path, monkeypatch):
    config = config_for(tmp_path, texts(40), holdout=0.2)
    first = prepare(config)

    def forbidden(*_):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr("tokmat_jax.data.corpus.make", forbidden)
        assert prepare(config).folder == first.folder
    (tmp_path / "corpus.txt").write_text("<|endoftext|>".join(texts(41)))
    assert prepare(config).folder != first.folder


def test_a_prepared_corpus_is_a_source_itself(tmp_path):
    corpus = prepare(config_for(tmp_path, texts(40), holdout=0.2))
    base = config_for(tmp_path, texts(40))
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, source=f"tfds:{corpus.folder}"))
    assert prepare(config).facts == corpus.facts
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=12))
    with pytest.raises(UserError, match="windows of 16 tokens"):
        prepare(wrong)


def test_an_interrupted_preparation_leaves_no_corpus_and_is_gone_on_with(tmp_path, monkeypatch):
    config = config_for(tmp_path, texts(40), holdout=0.2)

    def forbidden(*_):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_windows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert [path.name.split("-")[0] for path in left(tmp_path / "prepared")] == ["unfinished"]
    monkeypatch.setattr(tokenising, "_tokenise_unit", forbidden)
    corpus = prepare(config)
    assert corpus.facts["documents"] == 40
    assert left(tmp_path / "prepared") == [corpus.folder]
    assert {path.name for path in corpus.folder.iterdir()} == {"corpus.json", "tokenizer", "unigram.npy", "windows"}


def test_few_documents_give_their_last_ones(tmp_path):
    corpus = prepare(config_for(tmp_path, ["a" * 40, "b" * 40, "c" * 40], holdout=0.0001))
    assert corpus.facts["held_out_by"] == "last documents"
    held_out = ids_of(corpus, "validation").reshape(-1)
    assert held_out[0] == corpus.tokenizer.end_of_text
    assert set(corpus.tokenizer.decode(held_out.tolist())) == {"c"}


def test_one_document_gives_its_end(tmp_path):
    corpus = prepare(config_for(tmp_path, ["a" * 80 + "b" * 20], holdout=0.05))
    assert corpus.facts["held_out_by"] == "end of the only document"
    assert corpus.facts["validation_windows"] == 1
    assert "b" in corpus.tokenizer.decode(ids_of(corpus, "validation")[0].tolist())


def test_a_tokenizer_learns_even_where_the_only_document_is_held_out(tmp_path):
    # With nearly everything held out, the one document is certain to be.
    config = config_for(tmp_path, ["the cat sat on the mat " * 20], holdout=0.999999)
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=262))
    assert prepare(config).tokenizer.vocab_size == 262


def test_a_damaged_corpus_is_named(tmp_path):
    config = config_for(tmp_path, texts(40), holdout=0.2)
    corpus = prepare(config)
    (corpus.folder / "corpus.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: delete"):
        prepare(config)


@pytest.mark.parametrize(("source", "settings", "says"), [
    ("a.jsonl", {}, "note: 20 of 60 records have null for their text: skipped\n"),
    ("corpus.txt", {"separator": "\\n\\n"}, "note: data.separator '\\\\n\\\\n' occurs in no file, each is one "
                                            "document; in a shell, write a line end as $'\\n', with the dollar\n"),
    ("corpus.txt", {}, ""),
])
def test_what_may_not_have_been_meant_is_said(tmp_path, capsys, source, settings, says):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": None}) * (index % 2) + "\n" + json.dumps({"text": text}) + "\n"
        for index, text in enumerate(texts(40))))
    config = config_for(tmp_path, texts(40), holdout=0.2)
    data = dataclasses.replace(config.data, source=f"files:{tmp_path}/{source}", **settings)
    corpus = prepare(dataclasses.replace(config, data=data))
    said = capsys.readouterr().err
    assert "".join(line + "\n" for line in said.splitlines() if line.startswith("note")) == says
    assert corpus.facts["nulls"] == (20 if "null" in says else 0)


@pytest.mark.parametrize("text", ["short", "x" * 30])
def test_a_corpus_shorter_than_two_windows_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"fewer than two windows of 16"):
        prepare(config_for(tmp_path, [text]))
    assert left(tmp_path / "prepared") == []


@given(st.text(), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_what_is_held_out_stays_so_when_more_is(text, one, other):
    few, many = sorted((one, other))
    assert not is_held_out(text, few) or is_held_out(text, many)
