"""What holds for any settings, prompts, documents and interruptions: 100 examples each, and 1,000 behind `slow`."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import chex
import grain
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
import tiny
from loading import Source, taken
from scripts import ROOT, rows, stored
from tokmat_jax.config import (
    Config,
    DataConfig,
    GenerationConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TrainConfig,
)
from tokmat_jax.data import loader, pool
from tokmat_jax.data.corpus import prepare
from tokmat_jax.data.sources import parquet
from tokmat_jax.data.tokenising import is_held_out
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.distributed import mesh as sharding
from tokmat_jax.errors import UserError
from tokmat_jax.generation.batches import sample_key
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.reference import generate_by_reference
from tokmat_jax.storage.checkpoint import open_checkpoints
from tokmat_jax.training.step import make_train_functions

often = pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])


def for_all(examples, check, **drawn):
    """Runs `check` on so many examples of what is `drawn`."""
    settings(max_examples=examples)(given(**drawn)(check))()


# A sample depends on its prompt, its number, the seed and the settings alone


SHARES = st.floats(0.05, 0.95)
ANY = {"profile": st.sampled_from(["linear", "cosine", "constant"]), "max_maturity": SHARES, "rate": st.none() | SHARES,
       "tail_noise": st.floats(0.5, 2.0), "max_new_tokens": st.integers(5, 8)}
KINDS = {
    "plain": st.builds(GenerationConfig, tail_length=st.just(4), **ANY),
    "controlled": st.builds(
        GenerationConfig, tail_length=st.just(3), guidance_scale=st.floats(1.25, 3.0), repulsion=SHARES,
        fresh_noise=SHARES, history_noise=SHARES, history_smoothing=SHARES, **ANY),
    "stable": st.builds(
        GenerationConfig, tail_length=st.just(4), commit=st.just("stable"), max_commit=st.just(3),
        patience=st.integers(0, 2), tolerance=st.floats(0.1, 2.0), **ANY),
}
PROMPTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12)
                   | st.lists(st.integers(0, 255), min_size=17, max_size=24), min_size=1, max_size=4)


@functools.cache
def generator():
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    return Generator(tiny.CONFIG, tiny.shaken_params(vocab_size=tokenizer.vocab_size), tokenizer)


def naively(prompt, number, seed, setting):
    """What Algorithm 1 commits behind `prompt`, step by step over the whole sequence."""
    made = generator()
    name = np.array([seed, zlib.crc32(np.array(prompt, np.int32).tobytes()), number], np.uint32)
    return generate_by_reference(
        functools.partial(tiny.padded_forward(), made.backbone), made.vocabulary, prompt, setting.max_new_tokens,
        sample_key(name), made._tail(setting, None), made.tokenizer.ends,
        setting.max_commit if setting.commit == "stable" else 1)[0]


def assert_same(one, other):
    assert (one.number, one.tokens, one.passes, one.finished) == (other.number, other.tokens, other.passes,
                                                                  other.finished)
    np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-5)
    np.testing.assert_allclose(one.movement, other.movement, rtol=1e-4, atol=1e-5)


@often
def test_a_sample_is_the_same_in_any_company(examples):
    def check(setting, prompts, seed, numbers, sizes, data):
        make = functools.partial(generator().generate, settings=setting, seed=seed)
        samples = make(prompts, num_samples=numbers, batch_size=sizes[0])
        order = data.draw(st.permutations(range(len(prompts))))
        moved = make([prompts[index] for index in order], num_samples=numbers, batch_size=sizes[1])
        for place, index in enumerate(order):
            for number in range(numbers):
                assert_same(moved[place * numbers + number], samples[index * numbers + number])
        chosen = data.draw(st.integers(0, len(samples) - 1))
        prompt, number = prompts[chosen // numbers], chosen % numbers
        alone = make([prompt], num_samples=number + 1, batch_size=1)[number]
        assert_same(alone, samples[chosen])
        assert alone.tokens == naively(prompt, number, seed, setting)

    for_all(examples, check, setting=st.one_of(*KINDS.values()), prompts=PROMPTS, seed=st.integers(0, 2**32 - 1),
            numbers=st.integers(1, 2), sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 2), data=st.data())


# Packing: every document once, in order, whatever its file and whoever reads it


# Without half pairs, which are no text, without what the separator is made of, and without the mark that a file may
# begin with.
DOCUMENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufeff"), max_size=24)
FILES = st.lists(st.tuples(st.sampled_from(["txt", "jsonl", "parquet"]), st.lists(DOCUMENT, min_size=1, max_size=7)),
                 min_size=1, max_size=4)
PIECES = st.fixed_dictionaries({
    "windows._BLOCK": st.integers(1, 50), "windows._SHARD": st.integers(1, 99),
    "tokenising._BATCH_DOCUMENTS": st.integers(1, 4)})
SEPARATOR = "\n\x00\n"


def write_document_file(path, kind, documents):
    if kind == "txt":
        path.write_bytes(f"{SEPARATOR.join(documents)}\n".encode())  # a file of no bytes at all is refused
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        pyarrow.parquet.write_table(pa.table({"text": documents}), path, row_group_size=2)


@contextlib.contextmanager
def made_in_any_order(pieces, order):
    """Processes that finish when they like, and pieces of these sizes, wherever the making of a corpus has any."""

    @contextlib.contextmanager
    def processes(workers):
        yield lambda function, jobs: map(function, order.sample(list(jobs), len(jobs)))

    with pytest.MonkeyPatch.context() as patch:
        for name, size in pieces.items():
            patch.setattr(f"tokmat_jax.data.{name}", size)
        patch.setattr(pool, "processes", processes)
        patch.setattr(parquet, "_UNIT_BYTES", 1)
        yield


def packed(config, workers, pieces, order):
    """The streams of ids that the windows of both splits hold, the shares of tokens, and the facts."""
    with made_in_any_order(pieces, order):
        corpus = prepare(config, workers)
    streams = {split: np.concatenate([window["tokens"] for window in corpus.windows(split)])
               for split in ("train", "validation")}
    return streams, corpus.unigram(), corpus.facts


def expected_streams(documents, tokenizer, holdout, window):
    """Both splits as they should be before the remainder of a window is dropped, and by what rule."""
    end, streams = tokenizer.end_of_text, {False: [], True: []}
    for text in documents:
        streams[is_held_out(text, holdout)] += [end, *tokenizer.encode(text)]
    train, held_out = streams[False], streams[True]
    if min(len(train), len(held_out)) >= window:
        return train, held_out, "hash of the document"
    whole = train + held_out
    latest = max(window, len(whole) - max(window, int(holdout * len(whole))))
    starts = [place for place in range(window, latest + 1) if whole[place] == end]
    cut = starts[-1] if starts else latest
    return whole[:cut], whole[cut:], "last documents" if starts else "end of the only document"


@often
def test_every_token_of_every_document_is_packed_once(examples):
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])

    def check(files, holdout, window, workers, pieces, order):
        with tempfile.TemporaryDirectory() as name:
            for number, (kind, documents) in enumerate(files):
                write_document_file(Path(name, f"{number}.{kind}"), kind, documents)
            data = DataConfig(source=f"files:{name}/*.*", seq_len=window, holdout=holdout, separator=SEPARATOR,
                              prepared_dir=f"{name}/prepared")
            base = Config()
            config = dataclasses.replace(base, data=data, tokenizer=TokenizerConfig(kind="bytes"),
                                         maturation=dataclasses.replace(base.maturation, max_tail_length=2))
            documents = [text.strip() for _, texts in files for text in texts if text.strip()]
            total = sum(1 + len(text.encode()) for text in documents)
            if total < 2 * window:
                with pytest.raises(UserError):
                    packed(config, workers, pieces, order)
                return
            streams, unigram, facts = packed(config, workers, pieces, order)
        *expected, rule = expected_streams(documents, tokenizer, holdout, window)
        assert (facts["documents"], facts["tokens"], facts["held_out_by"]) == (len(documents), total, rule)
        for split, stream in zip(("train", "validation"), expected, strict=True):
            assert streams[split].tolist() == stream[: len(stream) // window * window]
            assert facts[f"{split}_windows"] == len(stream) // window >= 1
        counts = np.bincount(streams["train"], minlength=tokenizer.vocab_size)
        np.testing.assert_allclose(unigram, counts / counts.sum(), rtol=1e-6)

    for_all(examples, check, files=FILES, holdout=st.floats(0.01, 0.5), window=st.integers(10, 20),
            workers=st.integers(1, 3), pieces=PIECES, order=st.randoms(use_true_random=False))


# A run that is stopped, however often, is the run that is not


STEPS = 6
SMALL = dataclasses.replace(
    tiny.CONFIG, data=DataConfig(seq_len=16), model=ModelConfig(embed_dim=8, num_layers=1, num_heads=2),
    maturation=dataclasses.replace(tiny.CONFIG.maturation, max_tail_length=4),
    objective=ObjectiveConfig(num_negatives=8), train=TrainConfig(batch_size=2))
"""Of steps that take a millisecond."""
LIVES = st.lists(st.tuples(st.integers(0, STEPS), st.integers(0, STEPS)), max_size=2)
"""Of each life that ends too early, how many steps it makes and after how many of them it saves for the last time."""


class Text(Source):
    """Windows of ids that are all different."""

    def __init__(self, count):
        ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (count, SMALL.data.seq_len), np.int32)
        list.__init__(self, ({"tokens": row} for row in ids))


TEXT = Text(100)
"""Grain takes the longer to shuffle a number the fewer there are; more epochs than one are the next property's."""


@pytest.fixture
def _short_sight(monkeypatch):
    """A loader that reads less far ahead, since whoever jumps reads all of that again."""
    original = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **_: original(num_threads=1, prefetch_buffer_size=1))


@functools.cache
def training():
    """The mesh and the compiled functions of the tiny model."""
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return mesh, make_train_functions(SMALL, tiny.VOCAB, mesh)


def batches_of(seed):
    return loader.train_batches(TEXT, SMALL.train.batch_size, seed)


def steps_from(state, batches):
    """State, metrics and position after each step from `state` on, without an end."""
    _, functions = training()
    unigram = np.full(tiny.VOCAB, 1 / tiny.VOCAB, np.float32)
    for ids in batches:
        state, metrics = functions.step(state, ids, unigram)
        yield state, metrics, batches.position


def started():
    return training()[1].init(jax.random.key(0))


@functools.cache
def uninterrupted(seed):
    """Bytes of state and metrics before the first step and after every one."""
    following = steps_from(started(), batches_of(seed))
    return [bits((started(), {})), *(bits(next(following)[:2]) for _ in range(STEPS))]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def check_lives(seed, lives, save, restore):
    """Every life ends, and saves, with the state, the metrics and the position of the uninterrupted run."""
    mesh, _ = training()
    with jax.set_mesh(mesh):
        whole = uninterrupted(seed)
        for length, last_save in [*lives, (STEPS, STEPS)]:
            batches = batches_of(seed)
            state, position = restore() or (started(), 0)
            batches.seek(position)
            first = int(state.step)
            last = min(first + length, STEPS)
            for step, (now, metrics, position) in enumerate(steps_from(state, batches), first + 1):
                if step > last:
                    break
                assert position == step
                if step in (last, first + last_save):
                    assert bits((now, metrics)) == whole[step]
                if step == first + last_save:
                    save(now, position)


@often
@pytest.mark.usefixtures("optax_promotion", "_short_sight")
def test_a_run_that_is_stopped_anywhere_goes_on_bit_for_bit(examples):
    def check(seed, lives):
        kept = []
        check_lives(seed, lives, lambda state, position: kept.append((jax.device_get(state), position)),
                    lambda: kept[-1] if kept else None)

    for_all(examples, check, seed=st.integers(0, 2), lives=LIVES)


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("optax_promotion")
def test_checkpoints_are_what_it_goes_on_from(examples):
    def check(seed, lives):
        with tempfile.TemporaryDirectory() as folder:

            def save(state, position):
                with open_checkpoints(Path(folder), 2) as checkpoints:
                    checkpoints.save(state, position)

            def restore():
                with open_checkpoints(Path(folder), 2) as checkpoints:
                    return checkpoints.restore(training()[1].shapes) if checkpoints.latest_step() is not None else None

            check_lives(seed, lives, save, restore)

    for_all(examples, check, seed=st.integers(0, 2), lives=LIVES)


@functools.cache
def order(count, batch_size, seed):
    """The batches of two epochs and more."""
    return taken(loader.train_batches(Source(count), batch_size, seed), 2 * count // batch_size + 5)


@often
@pytest.mark.usefixtures("_short_sight")
def test_any_position_is_reached_from_any_other(examples):
    def check(count, batch_size, seed, moves):
        batches, expected = loader.train_batches(Source(count), batch_size, seed), order(count, batch_size, seed)
        for share, more in moves:
            position = int(share * (len(expected) - 4))
            batches.seek(position)
            assert batches.position == position
            assert taken(batches, more) == expected[position : position + more]
            assert batches.position == position + more

    for_all(examples, check, count=st.sampled_from([5, 12, 31]), batch_size=st.integers(1, 5), seed=st.integers(0, 2),
            moves=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 3)), min_size=1, max_size=4))


# The same seed, twice


CLOCKS = ("train/tokens_per_second", "train/step_seconds", "train/host_memory_gb")


def left_by(workdir):
    """All that a run has computed: its rows without clocks, its samples, its last state."""
    numbers = [{name: value for name, value in row.items() if name not in CLOCKS}
               for row in rows(workdir / "metrics.jsonl")]
    return numbers, rows(workdir / "samples.jsonl"), stored(workdir, "params"), stored(workdir, "optimizer")


def test_the_same_seed_gives_the_same_run(runs_dir):
    chex.assert_trees_all_equal(left_by(runs.run(runs_dir, "twice")), left_by(runs_dir / "run"))


@pytest.mark.slow
def test_the_order_of_sets_and_hashes_decides_nothing(tmp_path):
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        runs.write_corpus(folder)
        subprocess.run([sys.executable, ROOT / "train.py", *runs.arguments(folder, "run")], check=True, cwd=tmp_path,
                       capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)})
        found.append(left_by(folder / "run"))
    chex.assert_trees_all_equal(*found)
