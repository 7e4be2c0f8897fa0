import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

import spelling
from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data import tokenizer
from tokmat_jax.errors import UserError

BPE = tokenizer.train_bpe(["the cat sat on the mat"] * 20, 280)
BYTES = tokenizer.make_tokenizer(TokenizerConfig(kind="bytes"), [])


@pytest.mark.parametrize("one", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=st.text(st.characters(codec="utf-8")))
def test_every_text_survives_the_way_there_and_back(one, text):
    ids = one.encode(text)
    assert one.decode(ids) == text
    assert one.end_of_text not in ids
    assert all(0 <= token < one.vocab_size for token in ids)


def test_a_text_that_spells_the_special_token_stays_text():
    ids = BPE.encode("a<|endoftext|>b")
    assert BPE.end_of_text not in ids
    assert BPE.encode_batch(["a<|endoftext|>b"]) == [ids]


@pytest.mark.parametrize("one", spelling.KINDS.values(), ids=spelling.KINDS)
@given(data=st.data())
def test_the_parts_of_a_split_are_the_text_of_all_ids(one, data):
    ids = st.lists(st.integers(0, one.vocab_size - 1), max_size=12)
    before, new = data.draw(ids), data.draw(ids)
    assert "".join(one.split(before, new)) == one.decode([*before, *new])


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "wordpiece"])
def test_a_word_after_another_keeps_the_space_between_them(name):
    one = spelling.KINDS[name]
    ids = one.encode("the cat sat")
    assert one.decode(ids) == "the cat sat"
    assert one.split(ids[:1], ids[1:]) == ("the", " cat sat")
    assert one.split([*one.prefix], ids) == ("", "the cat sat")
    assert [one.piece(token) for token in ids[-2:]] == [" cat", " sat"]
    assert one.piece(one.end_of_text) == "⏹"


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace", "byte-level"])
@pytest.mark.parametrize("text", [" cat sat", "s on the", "", " "])
def test_a_text_after_others_ids_is_encoded_as_it_is_decoded(name, text):
    one = spelling.KINDS[name]
    before = one.encode("the")
    assert one.split(before, one.encode_after(before, text)) == ("the", text)


@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_a_character_of_several_bytes_belongs_to_the_ids_that_complete_it(name):
    one = spelling.KINDS[name]
    ids = one.encode("é😀x")
    inside = len(ids) - 3
    assert one.split(ids[:inside], ids[inside:]) == ("é", "😀x")
    # Bytes that are part of no character spoil no others.
    assert one.split(ids[:inside], ids[-1:]) == ("é\N{REPLACEMENT CHARACTER}", "x")
    assert one.decode(ids[:inside]) == "é\N{REPLACEMENT CHARACTER}"


def test_training_learns_merges_within_the_size():
    assert BPE.vocab_size <= 280
    assert len(BPE.encode("the cat")) < len("the cat")
    assert BYTES.vocab_size == 257
    assert len(BYTES.encode("thé")) == 4


def test_it_survives_the_disk(tmp_path):
    BPE.save(tmp_path)
    again = tokenizer.load_tokenizer(tmp_path)
    assert again.encode("the cat <|endoftext|>") == BPE.encode("the cat <|endoftext|>")
    assert (again.end_of_text, again.vocab_size) == (BPE.end_of_text, BPE.vocab_size)


def test_a_hugging_face_folder_loads(tmp_path):
    from transformers import PreTrainedTokenizerFast

    BPE.save(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "hf")
    loaded = tokenizer.make_tokenizer(TokenizerConfig(kind="huggingface", name=str(tmp_path / "hf")), [])
    assert loaded.encode("the cat sat") == BPE.encode("the cat sat")
    assert loaded.end_of_text == BPE.end_of_text


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text"):
        tokenizer.hugging_face(str(tmp_path))


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no usable tokenizer"):
        tokenizer.load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no usable tokenizer"):
        tokenizer.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot load"):
        tokenizer.hugging_face(str(tmp_path / "nothing"))
