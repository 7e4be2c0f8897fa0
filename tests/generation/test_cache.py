"""Cached decoding against the naive decoder, which runs the whole sequence again at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax.generation import cache
from tokmat_jax.generation.reference import generate_by_reference
from tokmat_jax.method.algorithm import Record, decode, liquid_step, start_decoding
from tokmat_jax.method.guidance import Guidance
from tokmat_jax.method.table import look_up
from tokmat_jax.model.backbone import make_forward

END, NEW, WIDTH, BATCH = 0, 6, 8, 4
CAPACITY = 24
ROOM = cache.room_of(tiny.CONFIG.model, CAPACITY, 1)


@functools.cache
def compiled(length: int, most: int = 1):
    _, forward, _ = tiny.model()

    @jax.jit
    def begin(params, vocabulary, ids, lengths, budgets, keys, tail):
        vectors = look_up(vocabulary.table, ids)
        told = jnp.full((BATCH,), tail.model_tail_length)
        memory = cache.prefill(functools.partial(forward, params), vectors, told, lengths, ROOM,
                               tail.repulsion is not None)
        newest = jnp.maximum(lengths[:, None] - most + jnp.arange(most)[None], 0)
        recent = vectors[jnp.arange(BATCH)[:, None], newest]
        return start_decoding(keys, recent, lengths, budgets, memory, tail, 1.0)

    @jax.jit
    def step(params, vocabulary, state, tail):
        predict = cache.cached_predict(functools.partial(forward, params), tail)
        return liquid_step(state, predict, vocabulary, tail, (END,), Record(read_tail=True, keep_vectors=True))

    return begin, step


def cached(prompts, tail, keys, garbage=0, most=1, pins=None):
    """Tokens per row and the tail after each contraction, [steps, K, d] per row."""
    params, _, vocabulary = tiny.model()
    length = tail.maturity.shape[0]
    begin, step = compiled(length, most)
    ids = np.full((BATCH, WIDTH), garbage, np.int32)
    lengths, budgets = np.ones(BATCH, np.int32), np.zeros(BATCH, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row], budgets[row] = prompt, len(prompt), NEW
    keys = jnp.concatenate([keys, jax.random.split(jax.random.key(99), BATCH)])[:BATCH]
    state = begin(params, vocabulary, ids, lengths, budgets, keys, tail)
    if pins:
        held = np.full((BATCH, length), -1, np.int32)
        held[:, list(pins)] = list(pins.values())
        state = state.replace(pinned=jnp.array(held))
    tokens, tails = [[] for _ in prompts], [[] for _ in prompts]
    while not np.all(state.done):
        state, out = step(params, vocabulary, state, tail)
        for row in range(len(prompts)):
            if out.committed[row]:
                tokens[row] += np.asarray(out.tokens[row, : out.committed[row]]).tolist()
                tails[row].append(np.asarray(out.vectors[row]))
    return tokens, tails


one_prompt = st.lists(st.integers(1, tiny.VOCAB - 1), min_size=1, max_size=WIDTH)
prompt_lists = st.lists(one_prompt, min_size=1, max_size=BATCH)
batches = {"prompts": prompt_lists, "seed": st.integers(0, 100),
           "profile": st.sampled_from(["linear", "cosine", "constant"]), "rate": st.sampled_from([None, 0.3, 1.0])}


def stable(patience, tolerance):
    return {"commit": "stable", "patience": patience, "tolerance": tolerance}


def steered(slots=(), schedule="fade"):
    direction = tiny.model()[2].table[7] - tiny.model()[2].table[8]
    return {"direction": direction, "steering": 0.4, "steering_slots": slots, "steering_schedule": schedule,
            "max_new_tokens": NEW}


CONTROLS = {
    "plain": lambda length: {},
    "guidance": lambda length: {"guidance_scale": 2.0},
    "repulsion": lambda length: {"repulsion": 0.5, "repulsion_sharpness": 1.0},
    "guidance and repulsion": lambda length: {"guidance_scale": 2.0, "repulsion": 0.5},
    "history": lambda length: {"history_noise": 0.5, "history_smoothing": 0.4},
    "fresh noise": lambda length: {"fresh_noise": 0.6},
    "steering": lambda length: steered(),
    "front steered": lambda length: steered((0,), "rise"),
    "stable": lambda length: stable(1, 0.6),
    "all": lambda length: {"guidance_scale": 2.0, "repulsion": 0.5, "fresh_noise": 0.3, "history_noise": 0.3,
                           "history_smoothing": 0.4, **steered(), **stable(0, 1.2)},
}
MOST = {"stable": 3, "all": 4}


@pytest.mark.parametrize(("length", "name"), [
    *((length, name) for length in (1, 4) for name in ("plain", "guidance", "repulsion")),
    *((length, name) for length in (2, 16) for name in ("plain", "guidance and repulsion")),
    *((3, name) for name in ("history", "fresh noise", "steering", "front steered", "stable", "all")),
    (1, "stable"), (7, "all")])
@settings(max_examples=6)
@given(**batches)
def test_cached_equals_naive(length, name, prompts, seed, profile, rate):
    check_against_naive(length, name, prompts, seed, profile, rate)


@pytest.mark.slow
@settings(max_examples=150)
@given(length=st.sampled_from([1, 2, 4, 7, 16]), name=st.sampled_from(list(CONTROLS)), **batches)
def test_cached_equals_naive_at_length(length, name, prompts, seed, profile, rate):
    check_against_naive(length, name, prompts, seed, profile, rate)


def check_against_naive(length, name, prompts, seed, profile, rate, pins=None):
    """Tokens equal and vectors of every slot to 1e-5, together and alone."""
    params, _, vocabulary = tiny.model()
    most = min(MOST.get(name, 1), length)
    tail = tiny.tail(length, profile=profile, tail_noise=0.5, rate=rate, **CONTROLS[name](length))
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    together, tails = cached(prompts, tail, keys, seed % tiny.VOCAB, most, pins)
    model = functools.partial(tiny.padded_forward(), params)
    for row, prompt in enumerate(prompts):
        tokens, trajectory = generate_by_reference(model, vocabulary, prompt, NEW, keys[row], tail, (END,), most, pins)
        assert together[row] == tokens
        np.testing.assert_allclose(np.stack(tails[row]), trajectory, atol=1e-5)
        alone, _ = cached([prompt], tail, keys[row : row + 1], most=most, pins=pins)
        assert alone[0] == tokens


@pytest.mark.parametrize("name", ["plain", "all"])
@settings(max_examples=6)
@given(**batches, pins=st.dictionaries(st.integers(0, 3), st.integers(1, tiny.VOCAB - 1), min_size=1))
def test_pinned_tokens_come_where_they_are_pinned(name, prompts, seed, profile, rate, pins):
    check_against_naive(4, name, prompts, seed, profile, rate, pins)
    tail = tiny.tail(4, profile=profile, tail_noise=0.5, rate=rate, **CONTROLS[name](4))
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    for tokens in cached(prompts, tail, keys, most=min(MOST.get(name, 1), 4), pins=pins)[0]:
        for place, token in pins.items():
            assert tokens[place : place + 1] in ([], [token])
            assert len(tokens) > place or tokens[-1] == END


def test_one_token_a_step_and_no_bound_is_the_plain_algorithm():
    # Stable commits of at most one token, whatever has settled: bit for bit the plain decoder's.
    prompts, keys = [[5, 9, 33], [7]], jax.random.split(jax.random.key(0), 2)
    plain, bounded = (cached(prompts, tiny.tail(4, tail_noise=0.5, **more), keys) for more in ({}, stable(0, 1e6)))
    assert plain[0] == bounded[0]
    for one, other in zip(*(tails for _, tails in (plain, bounded)), strict=True):
        np.testing.assert_array_equal(np.stack(one), np.stack(other))


def test_with_nothing_to_wait_for_as_many_are_committed_as_may_be():
    keys = jax.random.split(jax.random.key(0), 1)
    tail = tiny.tail(4, tail_noise=0.5, **stable(0, 1e6))
    tokens, tails = cached([[5, 9, 33]], tail, keys, most=4)
    # Four and the two that are left of the budget, unless the text ends before.
    assert len(tails[0]) == (2 if len(tokens[0]) > 4 else 1)
    assert len(tokens[0]) == NEW or tokens[0][-1] == END


def test_an_early_commit_recomputes_no_part_of_the_history_differently():
    params, _, vocabulary = tiny.model()
    tail = tiny.tail(4, tail_noise=0.5, **stable(0, 1e6))
    begin, step = compiled(4, 3)
    lengths = jnp.array([1, 2, 8, 3])
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    state = begin(params, vocabulary, ids, lengths, jnp.full((BATCH,), NEW), jax.random.split(jax.random.key(3), BATCH),
                  tail)
    after, _ = step(params, vocabulary, state, tail)
    for row, length in enumerate(lengths):
        for new, old in zip(after.memory, state.memory, strict=True):
            np.testing.assert_allclose(new.key[row, :, :length], old.key[row, :, :length], atol=1e-5)


def test_immediate_projection_is_greedy_nearest_token_decoding():
    params, forward, vocabulary = tiny.model()
    tail = tiny.tail(1, profile="constant", max_maturity=1.0, tail_noise=0.5)
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
    tail = tiny.tail(4, tail_noise=0.5)
    begin, _ = compiled(4)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    state = begin(params, vocabulary, ids, jnp.full((BATCH,), WIDTH), jnp.full((BATCH,), NEW), keys, tail)
    model = functools.partial(forward, params)
    guided = cache.cached_predict(model, tail.replace(guidance=Guidance(jnp.float32(1.0))))
    plain = cache.cached_predict(model, tail)
    np.testing.assert_allclose(guided(state)[0], plain(state)[0], atol=1e-6)


def test_the_unconditional_pass_reads_no_history():
    params, forward, vocabulary = tiny.model()
    # At s = 0 the prediction is the unconditional one.
    tail = tiny.tail(4, tail_noise=0.5, guidance_scale=0.0)
    begin, _ = compiled(4)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    budgets = jnp.full((BATCH,), NEW)
    predict = cache.cached_predict(functools.partial(forward, params), tail)
    lengths = jnp.full((BATCH,), WIDTH)
    one, _ = predict(begin(params, vocabulary, ids, lengths, budgets, keys, tail))
    other, _ = predict(begin(params, vocabulary, ids.at[:, :-1].set(1), lengths, budgets, keys, tail))
    np.testing.assert_allclose(one, other, atol=1e-6)
    moved, _ = predict(begin(params, vocabulary, ids.at[:, -1].add(1), lengths, budgets, keys, tail))
    assert np.abs(one - moved).max() > 1e-3


def test_a_step_adds_one_position_to_the_history_and_rewrites_none():
    params, forward, vocabulary = tiny.model()
    tail = tiny.tail(4, tail_noise=0.5)
    begin, _ = compiled(4)
    lengths = jnp.array([2, 5, 8, 3])
    ids = jax.random.randint(jax.random.key(4), (BATCH, WIDTH), 1, tiny.VOCAB)
    keys = jax.random.split(jax.random.key(3), BATCH)
    state = begin(params, vocabulary, ids, lengths, jnp.full((BATCH,), NEW), keys, tail)
    predict = cache.cached_predict(functools.partial(forward, params), tail)
    state, _ = liquid_step(state, predict, vocabulary, tail, (END,))
    _, memory = predict(state)
    changed = np.any([np.any(np.asarray(new.key != old.key), axis=(1, 3))
                      for new, old in zip(memory, state.memory, strict=True)], axis=0)
    for row, length in enumerate(lengths):
        assert np.flatnonzero(changed[row]).tolist() == [int(length)]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["guidance and repulsion", "all"])
def test_the_decode_loop_lowers_for_accelerators(platform, name):
    params, _, vocabulary = tiny.model()
    tail, most = tiny.tail(4, **CONTROLS[name](4)), MOST.get(name, 1)
    begin, _ = compiled(4, most)
    keys = jax.random.split(jax.random.key(3), BATCH)
    ids, lengths = jnp.ones((BATCH, WIDTH), jnp.int32), jnp.full((BATCH,), WIDTH)
    state = begin(params, vocabulary, ids, lengths, jnp.full((BATCH,), NEW), keys, tail)
    forward = make_forward(tiny.CONFIG)

    @jax.jit
    def loop(params, vocabulary, state):
        predict = cache.cached_predict(functools.partial(forward, params), tail)
        return decode(state, predict, vocabulary, tail, (END,), NEW)[1]

    assert jax.export.export(loop, platforms=[platform])(params, vocabulary, state).platforms == (platform,)
