"""What holds for any settings, prompts, documents and interruptions: 200 examples each, and 2,000 behind `slow`."""

import functools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax.buckets import sample_key
from tokmat_jax.config import GenerationConfig, TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.generator import Generator
from tokmat_jax.naive import generate_naively

often = pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])


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
    return generate_naively(
        made.backbone, tiny.padded_forward(), made.vocabulary, prompt, setting.max_new_tokens, sample_key(name),
        made._tail(setting, None), tiny.CONFIG.table.radius, made.tokenizer.end_of_text, setting.tail_length,
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
