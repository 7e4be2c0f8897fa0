"""Files from elsewhere, damaged at random: a reader ends in success or in one line that says what is wrong.

Of every reader some hundred inputs, and with `-m slow` thousands; each follows from its number.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import logging
import lzma
import random
import re
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy
import zstandard

import checkpoints
from tokmat_jax.commands import generate
from tokmat_jax.config import Config, DataConfig
from tokmat_jax.data import sources
from tokmat_jax.data.tokenizer import hugging_face, load_tokenizer, train_bpe
from tokmat_jax.errors import UserError
from tokmat_jax.generation.trajectory import load_trajectory
from tokmat_jax.hf.convert import import_weights
from tokmat_jax.hf.files import Safetensors
from tokmat_jax.hf.gguf_file import Gguf
from tokmat_jax.storage.workdir import known_corpus, load_config, save_config
from trajectories import made_trajectory

FEW, MANY = 200, 3_000
SECONDS = 5.0
"""What a reader may compute for one tiny input, whatever else the machine does meanwhile."""
ROOM = 2 << 30
"""Address space that it may take: a length that is believed takes more."""

NUMBERS = [b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"1e-400", b"9" * 5000, b"2147483648", b"4294967295",
           b"9223372036854775807", b"18446744073709551616", b"0.5", b"-0.0"]
STRINGS = [b'""', b'"\\ud800"', b'"\\u0000"', b'"../../x"', b'"/etc/passwd"', b'"a\\nb\\u001b[2J"',
           b'"' + b"x" * 3000 + b'"']
VALUES = [*NUMBERS, *STRINGS, b"null", b"true", b"[]", b"{}", b"[" * 5000, b'{"a":' * 3000, b"[[[[1]]]]",
          b'{"a": {"a": 1}}']
BYTES = [b"\xff", b"\xed\xa0\x80", b"\0" * 9, b"\xff" * 9, b"\xe2\x80\xa8", b"\x1b[2J", b"\n", b'"', b"\\",
         b"\xef\xbb\xbf"]
EXTREMES = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63,
            2**64 - 1]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null')


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of `seeds`, damaged once or a few times."""
    data = bytearray(rng.choice(seeds))
    # What is still JSON gets further than what is not.
    damages = (replace_token,) if data[:1] == b"{" and rng.random() < 0.5 else DAMAGES
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(damages)(rng, data, seeds)
    return bytes(data)


def _slice(rng: random.Random, data: bytes | bytearray) -> slice:
    begin = rng.randrange(len(data) + 1)
    return slice(begin, begin + rng.choice((1, 2, 4, 8, rng.randrange(len(data) + 1))))


def flip_bit(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1):]


def insert(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    begin = rng.randrange(len(data) + 1)
    data[begin:begin] = rng.choice((rng.randbytes(rng.randrange(1, 20)), rng.choice(BYTES), rng.choice(VALUES)))


def overwrite(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    new = rng.choice((rng.randbytes(rng.randrange(1, 9)), rng.choice(BYTES)))
    begin = rng.randrange(len(data) + 1)
    data[begin:begin + len(new)] = new


def overwrite_number(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    begin = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        begin -= begin % size  # where a binary format is likely to have a number
    data[begin:begin + size] = (rng.choice(EXTREMES) % 256**size).to_bytes(size, rng.choice(("little", "big")))


def delete(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    del data[_slice(rng, data)]


def duplicate(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    part = data[_slice(rng, data)]
    begin = rng.randrange(len(data) + 1)
    data[begin:begin] = part


def splice(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    other = rng.choice(seeds)
    data[_slice(rng, data)] = other[_slice(rng, other)]


def replace_token(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    """Where there is JSON, one of its values or names becomes another."""
    if found := [*TOKEN.finditer(data)]:
        begin, end = rng.choice(found).span()
        is_name = data[end:end + 2].strip().startswith(b":")
        data[begin:end] = rng.choice(STRINGS if is_name else VALUES)


DAMAGES = (flip_bit, truncate, insert, overwrite, overwrite_number, delete, duplicate, splice, replace_token)


@dataclass(frozen=True)
class Reader:
    """Something that reads a file from elsewhere."""

    file: str
    """The file that is damaged."""
    seeds: Callable[[Path], list[bytes]]
    """Fills a folder with what the reader wants beside the file; returns the file's contents when it is whole."""
    read: Callable[[Path], Any]
    """Reads the file in that folder."""
    wrap: Callable[[bytes], bytes] = bytes
    """Puts what was damaged into a file; with this, damage reaches what a checksum or a length would hide."""


TOKENIZER = train_bpe(["the cat sat on the mat"] * 3, 270)
TEXTS = ["the cat", "∂ sat\non", "mat"]


def lines(field: str) -> list[bytes]:
    return ["\n".join(json.dumps({"id": 1.5, field: text}, ensure_ascii=escaped) for text in TEXTS).encode()
            for escaped in (True, False)]


def documents(folder: Path, name: str) -> None:
    config = DataConfig(source=f"files:{folder / name}")
    assert [text for unit in sources.units(config) for text in sources.documents(config, unit)] == [
        *sources.documents(config)]


def prompts(folder: Path, name: str) -> None:
    generate.read_prompts(generate.Args("run", prompts_file=str(folder / name)))


def parquet(folder: Path) -> list[bytes]:
    found = []
    for kind, settings in ((pa.string(), {}), (pa.large_string(), {"compression": "zstd"}),
                           (pa.binary(), {"use_dictionary": False, "compression": "gzip"}),
                           (pa.list_(pa.string()), {"data_page_version": "2.0"})):
        texts = [TEXTS] if pa.types.is_list(kind) else TEXTS
        column = pa.array([*texts, None], kind)
        stream = io.BytesIO()
        table = pa.table({"n": range(len(column)), "text": column})
        pyarrow.parquet.write_table(table, stream, row_group_size=2, **settings)
        found.append(stream.getvalue())
    return found


def gguf_file(folder: Path) -> list[bytes]:
    gguf = pytest.importorskip("gguf", reason="GGUF files need gguf: pip install -e '.[gguf]'")
    found = []
    for architecture, kind in (("llama", "F32"), ("gpt2", "Q8_0")):
        writer = gguf.GGUFWriter(folder / "seed.gguf", architecture)
        for add, value in ((writer.add_context_length, 64), (writer.add_embedding_length, 32),
                           (writer.add_block_count, 1), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
                           (writer.add_feed_forward_length, 8), (writer.add_layer_norm_rms_eps, 1e-5),
                           (writer.add_layer_norm_eps, 1e-5), (writer.add_tokenizer_model, "gpt2"),
                           (writer.add_tokenizer_pre, "gpt-2"), (writer.add_token_types, [3, 1, 1, 1]),
                           (writer.add_token_list, ["<|endoftext|>", "a", "b", "ab"]),
                           (writer.add_token_merges, ["a b"]), (writer.add_eos_token_id, 0),
                           (writer.add_bos_token_id, 1), (writer.add_add_bos_token, True)):
            add(value)
        quantised = gguf.GGMLQuantizationType[kind]
        for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight"):
            if architecture == "llama" or "attn_q" not in name:
                writer.add_tensor(name, gguf.quantize(np.ones((4, 32), np.float32), quantised),
                                  raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append((folder / "seed.gguf").read_bytes())
    return found


def read_gguf(folder: Path) -> None:
    stored = Gguf(folder / "a.gguf")
    for name in stored.shapes:
        stored.read(name)
    stored.settings()
    stored.tokenizer()


def weights(folder: Path) -> list[bytes]:
    one = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.float16), "c": np.ones((), np.float32)}
    return [safetensors.numpy.save(one), safetensors.numpy.save({"a.weight": np.ones(7, np.float32)}, {"format": "pt"})]


def header(folder: Path) -> list[bytes]:
    return [whole[8:8 + struct.unpack("<Q", whole[:8])[0]] for whole in weights(folder)]


def read_weights(folder: Path) -> None:
    stored = Safetensors(folder)
    for name in stored.shapes:
        stored.read(name)


def index(folder: Path) -> list[bytes]:
    for name in ("x", "y"):
        safetensors.numpy.save_file({name: np.ones(2, np.float32)}, folder / f"{name}.safetensors")
    return [json.dumps({"metadata": {"total_size": 16}, "weight_map": {name: f"{name}.safetensors" for name in "xy"}},
                       indent=2).encode()]


def checkpoint(folder: Path) -> list[bytes]:
    """Without weights: reading ends where they are asked for."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
            "mscale": 0.7, "mscale_all_dim": 0.5}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 16,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return [json.dumps(one).encode() for one in (
        checkpoints.CONFIG, checkpoints.CONFIG | {"rope_parameters": rope, "auto_map": {"AutoConfig": "x.Y"}},
        checkpoints.CONFIG | {"model_type": "qwen2", "rope_scaling": llama3}, gpt2)]


def read_checkpoint(folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        import_weights(str(folder), folder / "out")


def run_config(folder: Path) -> list[bytes]:
    save_config(Config(), folder)
    return [(folder / "config.json").read_bytes(), json.dumps(dataclasses.asdict(Config())).encode()]


def fast_tokenizer(folder: Path) -> list[bytes]:
    TOKENIZER.save(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "tokenizer_class": '
                                                  '"PreTrainedTokenizerFast"}')
    return [(folder / "tokenizer.json").read_bytes()]


def tokenizer_facts(folder: Path) -> list[bytes]:
    TOKENIZER.save(folder)
    return [(folder / "tokenizer_meta.json").read_bytes(), b'{"end_of_text": 0, "prefix": [1, 2], "vocab_size": 300}']


def tokenizer_config(folder: Path) -> list[bytes]:
    fast_tokenizer(folder)
    return [(folder / "tokenizer_config.json").read_bytes(), json.dumps(
        {"eos_token": "<|endoftext|>", "bos_token": {"content": "a", "__type": "AddedToken"}, "model_max_length": 9,
         "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
         "tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}).encode()]


def use_tokenizer(tokenizer: Any) -> None:
    tokenizer.decode(tokenizer.encode("the cat <|endoftext|> ∂\0"))


def trajectory(folder: Path) -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **made_trajectory())
        found.append(stream.getvalue())
    return found


def npy(folder: Path) -> list[bytes]:
    found = []
    for array, version in ((np.arange(8, dtype=np.float32), (1, 0)), (np.ones((2, 4), np.float16), (2, 0)),
                           (np.array(["a"]), (1, 0))):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array, version)
        found.append(stream.getvalue())
    return found


def into_npz(member: bytes) -> bytes:
    """A trajectory whose `prompt` is `member`, with a checksum that says so."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in made_trajectory().items():
            with archive.open(f"{name}.npy", "w") as opened:
                if name == "prompt":
                    opened.write(member)
                else:
                    np.save(opened, array)
    return stream.getvalue()


def direction(folder: Path) -> None:
    found = generate.steering_vector(generate.Args("run", steering_vector=str(folder / "v.npy")))
    assert found is not None
    np.isfinite(found).all()


def packed(suffix: str, pack: Callable[[bytes], bytes], inner: str) -> Reader:
    def seeds(folder: Path) -> list[bytes]:
        return [pack(text) for text in lines("text")]

    name = f"a.{inner}{suffix}"
    return Reader(name, seeds, lambda folder: documents(folder, name))


READERS = {
    "prompts": Reader("p.txt", lambda folder: ["\n".join(TEXTS).encode()], lambda folder: prompts(folder, "p.txt")),
    "prompts, JSONL": Reader("p.jsonl", lambda folder: lines("prompt"), lambda folder: prompts(folder, "p.jsonl")),
    "text": Reader("a.txt", lambda folder: ["<|endoftext|>".join(TEXTS).encode()],
                   lambda folder: documents(folder, "a.txt")),
    "JSONL": Reader("a.jsonl", lambda folder: lines("text"), lambda folder: documents(folder, "a.jsonl")),
    "text, gzip": packed(".gz", gzip.compress, "txt"),
    "JSONL, gzip": packed(".gz", gzip.compress, "jsonl"),
    "JSONL, bzip2": packed(".bz2", bz2.compress, "jsonl"),
    "JSONL, xz": packed(".xz", lzma.compress, "jsonl"),
    "JSONL, zstd": packed(".zst", zstandard.ZstdCompressor().compress, "jsonl"),
    "Parquet": Reader("a.parquet", parquet, lambda folder: documents(folder, "a.parquet")),
    "GGUF": Reader("a.gguf", gguf_file, read_gguf),
    "safetensors": Reader("model.safetensors", weights, read_weights),
    "safetensors header": Reader("model.safetensors", header, read_weights,
                                 lambda text: struct.pack("<Q", len(text)) + text + bytes(28)),
    "safetensors index": Reader("model.safetensors.index.json", index, read_weights),
    "checkpoint's config": Reader("config.json", checkpoint, read_checkpoint),
    "run's config": Reader("config.json", run_config, load_config),
    "run's corpus": Reader("corpus.json", lambda folder: [b'{"fingerprint": "abc", "tokens": 3}'],
                           known_corpus),
    "tokenizer": Reader("tokenizer.json", fast_tokenizer, lambda folder: use_tokenizer(load_tokenizer(folder))),
    "tokenizer's facts": Reader("tokenizer_meta.json", tokenizer_facts,
                                lambda folder: use_tokenizer(load_tokenizer(folder))),
    "tokenizer of transformers": Reader("tokenizer.json", fast_tokenizer,
                                        lambda folder: use_tokenizer(hugging_face(str(folder)))),
    "tokenizer's config": Reader("tokenizer_config.json", tokenizer_config,
                                 lambda folder: use_tokenizer(hugging_face(str(folder)))),
    "trajectory": Reader("t.npz", trajectory, lambda folder: load_trajectory(folder / "t.npz")),
    "trajectory's arrays": Reader("t.npz", npy, lambda folder: load_trajectory(folder / "t.npz"), into_npz),
    "steering vector": Reader("v.npy", npy, direction),
}


class Hang(BaseException):
    """A reader took too long."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What runs inside may take neither long nor much more memory than is taken already."""

    def stop(*_):
        raise Hang

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    taken = Path("/proc/self/statm")
    if taken.exists():
        size = int(taken.read_text().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (size if before[1] == resource.RLIM_INFINITY else min(size, before[1]),
                                                before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def failure(reader: Reader, folder: Path, data: bytes) -> str | None:
    """What is wrong with how `reader` takes a file that holds `data`; None where nothing is."""
    (folder / reader.file).write_bytes(reader.wrap(data))
    try:
        reader.read(folder)
    except UserError as error:
        return None if str(error).isprintable() and len(str(error)) < 1500 else f"no line: {str(error)!a}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return ascii(f"{type(error).__name__}: {error}")
    return None


def failures(name: str, folder: Path, count: int) -> Iterator[str]:
    """Numbers of the inputs that `name` does not take as it should, and what happens instead."""
    reader = READERS[name]
    seeds = reader.seeds(folder)
    for seed in seeds:
        if (wrong := failure(reader, folder, seed)) is not None:
            yield f"undamaged: {wrong}"
    before = {path.name for path in folder.iterdir()}
    with watched():
        for number in range(count):
            data = mutate(random.Random(f"{name} {number}"), seeds)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            wrong = failure(reader, folder, data)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if wrong is not None:
                yield f"input {number}: {wrong}"
    if new := {path.name for path in folder.iterdir()} - before - {reader.file, "corpus.json"}:
        yield f"left behind: {new}"


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Keeps what libraries log of strange files out of the reports, which take half of a surrogate pair no better."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, tmp_path):
    assert list(failures(name, tmp_path, FEW)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_no_damage_of_thousands_does_more(name, tmp_path):
    assert list(failures(name, tmp_path, MANY)) == []
