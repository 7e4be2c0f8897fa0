"""Text ↔ ids. Every kind of tokenizer is stored as one `tokenizers.Tokenizer` in a file, so a workdir needs no hub."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokmat_jax.config import TokenizerConfig
from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.output import without_torch_notice
from tokmat_jax.storage.workdir import TOKENIZER

END_OF_TEXT = "<|endoftext|>"
_FILE, _META = "tokenizer.json", "tokenizer_meta.json"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte; SentencePiece spells characters for which it has no token with these."""
_NO_LENGTH = 1e9
"""A model_max_length from here on means none."""
_MOST_IDS = 1 << 24
"""Limit on the number of ids: tables have as many rows, so a file must not claim any number."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says beside its ids; an export hands it on."""

    chat_template: str | None = None
    """How a conversation is written, in Jinja."""
    special_tokens: dict[str, Any] = field(default_factory=dict)
    """By the names that `transformers` gives them, such as `pad_token`."""
    max_length: int | None = None
    """Longest text, in tokens, that the tokenizer wants to be used for."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Its generation_config.json."""

    def __post_init__(self) -> None:
        kinds = (str | None, dict, int | None, dict)
        if not all(isinstance(value, kind) for value, kind in zip(vars(self).values(), kinds, strict=True)):
            raise ValueError("its origin is no chat template, special tokens, length and generation settings")


class Tokenizer:
    """A vocabulary of `vocab_size` V ids, one of which, `end_of_text`, separates documents.

    A sample ends at any of `ends`, the first of which is `end_of_text`. `prefix` are the ids that precede every text:
    none, or a beginning-of-text. Text that spells a special token is read as ordinary text, except in a chat. V counts
    the rows of an imported model; its tokenizer may have fewer ids. `origin` holds what a checkpoint says of its
    tokenizer and of generation; an export hands it on.
    """

    def __init__(
        self, fast: FastTokenizer, end_of_text: int, prefix: Iterable[int] = (), num_rows: int = 0,
        other_ends: Iterable[int] = (), origin: "Origin | None" = None,
    ):
        fast.encode_special_tokens = True
        fast.no_truncation()
        fast.no_padding()
        self.fast = fast
        self.end_of_text = end_of_text
        self.prefix = tuple(prefix)
        self.ends = (end_of_text, *(end for end in other_ends if end != end_of_text))
        self.origin = Origin() if origin is None else origin
        # Ids may have gaps: what counts is the largest.
        self.vocab_size = num_rows or max(fast.get_vocab(with_added_tokens=True).values()) + 1
        if beyond := self._read_beyond():
            raise UserError(f"the tokenizer has ids up to {beyond}, the table has {num_rows} rows")
        if self.vocab_size > _MOST_IDS:
            raise UserError(f"a vocabulary of {self.vocab_size:,} ids is not supported; the maximum is {_MOST_IDS:,}")

    def _read_beyond(self) -> int:
        """The largest id from V on that a text may have, 0 if there is none; special tokens are in no text."""
        special = {token for token, added in self.fast.get_added_tokens_decoder().items() if added.special}
        ids = self.fast.get_vocab(with_added_tokens=True).values()
        return max((token for token in ids if token >= self.vocab_size and token not in special), default=0)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation (each message with `role` and `content`), up to where the model's answer begins.

        The checkpoint's chat template writes the special tokens. Raises UserError if there is none, or if it cannot
        write these messages.
        """
        if self.origin.chat_template is None:
            raise UserError("this model has no chat template, so it does not say how a conversation is written: leave "
                            "out --chat")
        with without_torch_notice():
            from transformers import PreTrainedTokenizerFast

        with _refused("the model's chat template cannot write this conversation"):
            writer = PreTrainedTokenizerFast(tokenizer_object=self.fast, **self.origin.special_tokens)
            text = writer.apply_chat_template([dict(one) for one in messages], chat_template=self.origin.chat_template,
                                              tokenize=False, add_generation_prompt=True)
            self.fast.encode_special_tokens = False
            try:
                return self.fast.encode(str(text), add_special_tokens=False).ids
            finally:
                self.fast.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around them and without `prefix`."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [encoding.ids for encoding in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_split(self, before: str, new: str) -> tuple[list[int], list[int]]:
        """Ids of the text `before` + `new`, in two parts; a token that straddles the two counts as new."""
        encoding = self.fast.encode(before + new, add_special_tokens=False)
        cut = next((index for index, (_, end) in enumerate(encoding.offsets) if end > len(before)), len(encoding.ids))
        return encoding.ids[:cut], encoding.ids[cut:]

    def encode_after(self, before: Sequence[int], new: str) -> list[int]:
        """Ids of the text `new` as a continuation of the ids `before`: `split` turns them back into `new`."""
        ids = self.encode(new)
        # Some tokenizers put a space before every text.
        return ids if self.split(before, ids)[1] == new else self.encode_split(self.decode(before), new)[1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` by themselves, without special tokens. For what they add to other ids, see `split`."""
        text = self.fast.decode(list(ids), skip_special_tokens=True)
        return self._by_characters(ids) if self._has_bytes and "\N{REPLACEMENT CHARACTER}" in text else text

    def split(self, before: Sequence[int], new: Sequence[int]) -> tuple[str, str]:
        """Text of the ids `before`, and what the ids `new` add to it; joined, they are the text of all ids.

        The text of `new` alone would differ: many tokenizers drop the space before a text's first word. A character
        whose bytes straddle the two parts counts as new. More ids only append to what `new` adds, except that they may
        complete the character of a final U+FFFD.
        """
        begin, whole = self.decode(before), self.decode([*before, *new])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(begin, whole, strict=False))
        cut = len(begin) if whole.startswith(begin) else sum(1 for _ in same)
        return whole[:cut], whole[cut:]

    def piece(self, token: int) -> str:
        """Text of one id inside a text, white space included; end-of-text is shown as ⏹."""
        return "⏹" if token in self.ends else self.split(self._word, [token])[1]

    @functools.cached_property
    def _word(self) -> list[int]:
        return self.encode("a")

    @functools.cached_property
    def _has_bytes(self) -> bool:
        return self.fast.decoder is not None and b'"ByteFallback"' in self.fast.decoder.__getstate__()

    def _by_characters(self, ids: Sequence[int]) -> str:
        """As `decode`, but if a byte belongs to no character, only that byte becomes U+FFFD, so a text only grows with
        its ids. The library would turn the whole run of bytes into U+FFFD."""
        special = {token for token, added in self.fast.get_added_tokens_decoder().items() if added.special}
        pieces = filter(None, (self.fast.id_to_token(int(token)) for token in ids if token not in special))
        tokens = []
        for are_bytes, run in itertools.groupby(pieces, lambda piece: _BYTE.fullmatch(piece) is not None):
            whole = [*run]
            tokens += _characters(whole) if are_bytes else whole
        return self.fast.decoder.decode(tokens)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both tokenizers give every text the same ids."""
        mine, theirs = ((one.fast.to_str(), one.end_of_text, one.prefix, one.vocab_size) for one in (self, other))
        return mine == theirs

    def save(self, folder: Path) -> None:
        """Writes the tokenizer into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.fast.save(str(folder / _FILE))
        (folder / _META).write_text(json.dumps(
            {"end_of_text": self.end_of_text, "prefix": self.prefix, "vocab_size": self.vocab_size,
             "other_ends": self.ends[1:], "origin": dataclasses.asdict(self.origin)}) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote; raises UserError if the files are missing or damaged."""
    with _refused(f"no usable tokenizer in {folder}"):
        meta = json.loads((folder / _META).read_text())
        fast = FastTokenizer.from_file(str(folder / _FILE))
        return _tried(Tokenizer(
            fast, int(meta["end_of_text"]), map(int, meta["prefix"]), int(meta["vocab_size"]),
            map(int, meta.get("other_ends", ())), Origin(**meta.get("origin", {}))))


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turns any error in the block into a UserError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        # An unforeseen error in the library's Rust code arrives as a panic, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {one_line(str(error))}") from None


def _tried(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, after a test that encodes and decodes: many defects of a file only show then."""
    if not all(0 <= one < tokenizer.vocab_size for one in (*tokenizer.ends, *tokenizer.prefix)):
        raise UserError(f"its end-of-text {shown(tokenizer.ends)} and prefix {shown(tokenizer.prefix)} must be among "
                        f"its {tokenizer.vocab_size} ids")
    tokenizer.decode(tokenizer.encode("a b"))
    return tokenizer


def _characters(tokens: Iterable[str]) -> Iterator[str]:
    """`tokens` of one byte each, with U+FFFD for those that belong to no character."""
    for character in bytes(int(token[3:5], 16) for token in tokens).decode("utf-8", "replace"):
        if character == "\N{REPLACEMENT CHARACTER}":
            yield character
        else:
            yield from (f"<0x{byte:02X}>" for byte in character.encode())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on `texts`; it can encode any string. 257 ids are only the bytes and end-of-text."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(texts, trainer)
    end_of_text = fast.token_to_id(END_OF_TEXT)
    assert end_of_text is not None
    return Tokenizer(fast, end_of_text)


def hugging_face(name: str) -> Tokenizer:
    """A Hugging Face tokenizer by hub name or folder; never runs code that comes with it.

    Raises UserError if it cannot be loaded or has no end-of-text.
    """
    with without_torch_notice():
        from transformers import AutoTokenizer

    with _refused(f"cannot load the tokenizer {name!r}"):
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    fast = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        raise UserError(f"the tokenizer {name!r} has no fast form (tokenizer.json); convert it first")
    if loaded.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no end-of-text (eos_token), which separates documents")
    with _refused(f"the tokenizer {name!r} cannot be used"):
        plain, whole = (fast.encode("a", add_special_tokens=special).ids for special in (False, True))
        prefix = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), ())
        return _tried(Tokenizer(fast, int(loaded.eos_token_id), prefix, origin=_origin(loaded)))


def _origin(loaded: Any) -> Origin:
    """What a tokenizer of `transformers` says beside its ids."""
    template, length = loaded.chat_template, loaded.model_max_length
    special = {name: token if isinstance(token, str) else [str(one) for one in token]
               for name, token in loaded.special_tokens_map.items()}
    return Origin(template if isinstance(template, str) else None, special,
                  int(length) if length < _NO_LENGTH else None)


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` describes; `texts` are read only by a kind that is trained."""
    match config.kind:
        case "bpe":
            return train_bpe(texts, config.vocab_size)
        case "bytes":
            return train_bpe([], 257)
        case "huggingface":
            return hugging_face(config.name)
        case "workdir":
            return load_tokenizer(Path(config.name) / TOKENIZER)
