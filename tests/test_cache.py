"""Cached decoding against the naive decoder, which runs the whole sequence again at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax import cache, decode, maturation
from tokmat_jax.model import make_forward
from tokmat_jax.naive import generate_naively
from tokmat_jax.table import look_up

END, NEW, WIDTH, BATCH = 0, 6, 8, 4
CAPACITY = 24


@functools.cache
def compiled(length: int, guided: bool, repelled: bool = False):
    _, forward, _ = tiny.model()

    @jax.jit
    def begin(params, vocabulary, ids, lengths, budgets, keys, tail):
        vectors = look_up(vocabulary.table, ids)
        memory = cache.prefill(params, forward, vectors, jnp.full((BATCH,), length), CAPACITY, repelled)
        last = vectors[jnp.arange(BATCH), lengths - 1]
        return decode.start(keys, last, lengths, budgets, memory, tail, 1.0)

    @jax.jit
    def step(params, vocabulary, state, tail):
        predict = cache.cached_predict(params, forward, tail, length, guided, repelled)
        refined = maturation.contract(state.tail, predict(state)[0], tail.rate)
        return *decode.liquid_step(state, predict, vocabulary, tail, 1.0, END), refined

    return begin, step


def cached(prompts, tail, keys, garbage=0):
    """Tokens per row and the tail after each contraction, [steps, K, d] per row."""
    params, _, vocabulary = tiny.model()
    length = tail.maturity.shape[0]
    begin, step = compiled(length, float(tail.guidance_scale) != 1.0, float(tail.repulsion) != 0.0)
    ids = np.full((BATCH, WIDTH), garbage, np.int32)
    lengths, budgets = np.ones(BATCH, np.int32), np.zeros(BATCH, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row], budgets[row] = prompt, len(prompt), NEW
    keys = jnp.concatenate([keys, jax.random.split(jax.random.key(99), BATCH)])[:BATCH]
    state = begin(params, vocabulary, ids, lengths, budgets, keys, tail)
    tokens, tails = [[] for _ in prompts], [[] for _ in prompts]
    while not np.all(state.done):
        state, out, refined = step(params, vocabulary, state, tail)
        for row in range(len(prompts)):
            if out.emitted[row]:
                tokens[row].append(int(out.tokens[row, 0]))
                tails[row].append(np.asarray(refined[row]))
    return tokens, tails


one_prompt = st.lists(st.integers(1, tiny.VOCAB - 1), min_size=1, max_size=WIDTH)
prompt_lists = st.lists(one_prompt, min_size=1, max_size=BATCH)


batches = {"prompts": prompt_lists, "seed": st.integers(0, 100),
           "profile": st.sampled_from(["linear", "cosine", "constant"]), "rate": st.sampled_from([None, 0.3, 1.0]),
           "history_noise": st.sampled_from([0.0, 0.5]), "repulsion": st.sampled_from([0.0, 0.5]),
           "repulsion_sharpness": st.sampled_from([1.0, 10.0])}


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("length", [1, 2, 4, 16])
@settings(max_examples=6)
@given(**batches)
def test_cached_equals_naive(length, scale, prompts, seed, **how):
    check_against_naive(length, scale, prompts, seed, **how)


@pytest.mark.slow
@settings(max_examples=150)
@given(length=st.sampled_from([1, 2, 3, 4, 7, 16]), scale=st.sampled_from([1.0, 2.0, 3.0]), **batches)
def test_cached_equals_naive_at_length(length, scale, prompts, seed, **how):
    check_against_naive(length, scale, prompts, seed, **how)


def check_against_naive(length, scale, prompts, seed, profile, **controls):
    """Tokens equal and vectors of every slot to 1e-5, together and alone."""
    params, _, vocabulary = tiny.model()
    tail = decode.make_tail(length, profile, 0.9, noise=0.5, guidance_scale=scale, **controls)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    together, tails = cached(prompts, tail, keys, garbage=seed % tiny.VOCAB)
    for row, prompt in enumerate(prompts):
        tokens, trajectory = generate_naively(params, tiny.padded_forward(), vocabulary, prompt, NEW, keys[row], tail,
                                              1.0, END, length)
        assert together[row] == tokens
        np.testing.assert_allclose(np.stack(tails[row]), trajectory, atol=1e-5)
        alone, _ = cached([prompt], tail, keys[row : row + 1])
        assert alone[0] == tokens


def test_immediate_projection_is_greedy_nearest_token_decoding():
    params, forward, vocabulary = tiny.model()
    tail = decode.make_tail(1, "constant", 1.0, noise=0.5)
    prompt = [5, 9, 33]
    got, _ = cached([prompt], tail, jax.random.split(jax.random.key(0), 1))
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] != END):
        z = vocabulary.table[jnp.array(ids)][None]
        told, positions = jnp.array([1]), jnp.arange(len(ids))[None]
        output, _ = forward(params, z, jnp.ones((1, len(ids))), told, positions)
        ids.append(int(np.argmax(np.asarray(vocabulary.readout) @ np.asarray(output[0, -1]))))
    assert got[0] == ids[len(prompt):]


def test_guidance_of_one_equals_no_guidance():
    params, forward, vocabulary = tiny.model()
    tail = decode.make_tail(4, noise=0.5)
    begin, _ = compiled(4, False)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    state = begin(params, vocabulary, ids, jnp.full((BATCH,), WIDTH), jnp.full((BATCH,), NEW), keys, tail)
    guided = cache.cached_predict(params, forward, tail, 4, guided=True)
    plain = cache.cached_predict(params, forward, tail, 4, guided=False)
    np.testing.assert_allclose(guided(state)[0], plain(state)[0], atol=1e-6)


def test_the_unconditional_pass_reads_no_history():
    params, forward, vocabulary = tiny.model()
    # At s = 0 the prediction is the unconditional one.
    tail = decode.make_tail(4, noise=0.5, guidance_scale=0.0)
    begin, _ = compiled(4, True)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    budgets = jnp.full((BATCH,), NEW)
    predict = cache.cached_predict(params, forward, tail, 4, guided=True)
    lengths = jnp.full((BATCH,), WIDTH)
    one, _ = predict(begin(params, vocabulary, ids, lengths, budgets, keys, tail))
    other, _ = predict(begin(params, vocabulary, ids.at[:, :-1].set(1), lengths, budgets, keys, tail))
    np.testing.assert_allclose(one, other, atol=1e-6)
    moved, _ = predict(begin(params, vocabulary, ids.at[:, -1].add(1), lengths, budgets, keys, tail))
    assert np.abs(one - moved).max() > 1e-3


def test_a_step_adds_one_position_to_the_history_and_rewrites_none():
    params, forward, vocabulary = tiny.model()
    tail = decode.make_tail(4, noise=0.5)
    begin, _ = compiled(4, False)
    lengths = jnp.array([2, 5, 8, 3])
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    keys = jax.random.split(jax.random.key(3), BATCH)
    state = begin(params, vocabulary, ids, lengths, jnp.full((BATCH,), NEW), keys, tail)
    predict = cache.cached_predict(params, forward, tail, 4, False)
    state, _ = decode.liquid_step(state, predict, vocabulary, tail, 1.0, END)
    _, memory = predict(state)
    changed = np.any(np.asarray(memory.key) != np.asarray(state.memory.key), axis=(0, 3, 4))
    for row, length in enumerate(lengths):
        assert np.flatnonzero(changed[row]).tolist() == [int(length)]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_decode_loop_lowers_for_accelerators(platform):
    params, _, vocabulary = tiny.model()
    tail = decode.make_tail(4, guidance_scale=2.0, repulsion=0.5)
    begin, _ = compiled(4, True, True)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids, lengths = jnp.ones((BATCH, WIDTH), jnp.int32), jnp.full((BATCH,), WIDTH)
    state = begin(params, vocabulary, ids, lengths, jnp.full((BATCH,), NEW), keys, tail)
    forward = make_forward(tiny.CONFIG)

    @jax.jit
    def loop(params, vocabulary, state):
        predict = cache.cached_predict(params, forward, tail, 4, guided=True, repelled=True)
        return decode.run(state, predict, vocabulary, tail, 1.0, END, NEW)[1]

    assert jax.export.export(loop, platforms=[platform])(params, vocabulary, state).platforms == (platform,)
