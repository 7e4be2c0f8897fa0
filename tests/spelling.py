"""Tiny tokenizers of every kind of decoder, for what is written after a prompt."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data.tokenizer import Tokenizer, make_tokenizer, train_bpe

_WORDS = ["the", "cat", "sat", "on", "mat"]


def _made(model, decoder, normalizer=None, pre_tokenizer=None, num_rows=0):
    fast = FastTokenizer(model)
    fast.decoder = decoder
    if normalizer is not None:
        fast.normalizer = normalizer
    if pre_tokenizer is not None:
        fast.pre_tokenizer = pre_tokenizer
    fast.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    return Tokenizer(fast, 2, (1,), num_rows)


def sentencepiece(num_rows=0):
    """As in a Llama's `tokenizer.json`: ▁ for spaces, one of them before every text, bytes for other characters."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary += sorted(set("".join(_WORDS)))
    merges = []
    for word in _WORDS:
        parts = ["▁", *word]
        for end in range(1, len(parts)):
            merges.append(("".join(parts[:end]), parts[end]))
            vocabulary.append("".join(parts[: end + 1]))
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    model = models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)])
    return _made(model, decoder, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                 num_rows=num_rows)


def metaspace():
    """As in newer files of the same kind: the decoder itself drops the first space."""
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((f"▁{word}", -1.0) for word in _WORDS)]
    scores += [(letter, -4.0) for letter in sorted(set("".join(_WORDS)))]
    return _made(models.Unigram(scores, 0, False), decoders.Metaspace(), pre_tokenizer=pre_tokenizers.Metaspace())


def wordpiece():
    """As in BERT: lower case, a space before whatever does not begin with ##."""
    vocabulary = ["<unk>", "<s>", "</s>", ".", "a", *_WORDS]
    vocabulary += [f"##{letter}" for letter in sorted(set("".join(_WORDS)))]
    model = models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    return _made(model, decoders.WordPiece(), normalizers.Lowercase(), pre_tokenizers.Whitespace())


KINDS = {
    "bytes": make_tokenizer(TokenizerConfig(kind="bytes"), []), "byte-level": train_bpe(["the cat sat"] * 9, 270),
    "sentencepiece": sentencepiece(), "metaspace": metaspace(), "wordpiece": wordpiece(),
}
