"""Verified commits against the reference: immediate projection that is told the same K, whatever the drafts are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax.config import GenerationConfig, TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.evaluation.passes import reference_of
from tokmat_jax.generation import cache
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.reference import generate_by_reference
from tokmat_jax.method.algorithm import Record, liquid_step, start_decoding
from tokmat_jax.method.table import look_up
from tokmat_jax.method.tail import make_tail
from tokmat_jax.method.verification import Drafts, look_up_drafts, num_accepted

END, NEW, WIDTH, BATCH, CAPACITY = 0, 9, 8, 4, 30
ROOM = cache.room_of(tiny.CONFIG.model, CAPACITY, 1)
CONTROLS = {
    "plain": {},
    "guidance": {"guidance_scale": 2.0},
    "repulsion": {"repulsion": 0.5, "repulsion_sharpness": 1.0},
    "history": {"history_noise": 0.5, "history_smoothing": 0.4},
    "fresh noise": {"fresh_noise": 0.6},
    "steering": {"steering": 0.4, "steering_schedule": "fade"},
    "front steered": {"steering": 0.4, "steering_slots": (0,), "steering_schedule": "rise"},
    "back steered": {"steering": 0.4, "steering_slots": (1,)},
}
ALL = {name: value for control in ("guidance", "repulsion", "history", "fresh noise", "steering")
       for name, value in CONTROLS[control].items()}
CONTROLS["all"] = ALL


def setting(length, most, name, **more):
    return GenerationConfig(**{"tail_length": length, "max_commit": most, "commit": "verified", "max_new_tokens": NEW,
                               "tail_noise": 0.5, "draft": "tail", **CONTROLS[name], **more})


def tail_of(one):
    table = tiny.model()[2].table
    return make_tail(one, table[7] - table[8])


@jax.jit
def begin(params, vocabulary, ids, lengths, budgets, keys, tail):
    forward = tiny.model()[1]
    vectors, told = look_up(vocabulary.table, ids), jnp.full((BATCH,), tail.model_tail_length)
    memory = cache.prefill(functools.partial(forward, params), vectors, told, lengths, ROOM, tail.repulsion is not None)
    text = jnp.pad(ids, ((0, 0), (0, CAPACITY - WIDTH)))
    recent = vectors[jnp.arange(BATCH), lengths - 1][:, None]
    return start_decoding(keys, recent, lengths, budgets, memory, tail, 1.0,
                          None if tail.verification.draft == "tail" else text)


@jax.jit
def step(params, vocabulary, state, tail):
    predict = cache.cached_predict(functools.partial(tiny.model()[1], params), tail)
    return liquid_step(state, predict, vocabulary, tail, (END,), Record(read_tail=True, keep_vectors=True))


def started(prompts, tail, keys, pins=None):
    params, _, vocabulary = tiny.model()
    ids = np.full((BATCH, WIDTH), 33, np.int32)
    lengths, budgets = np.ones(BATCH, np.int32), np.zeros(BATCH, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row], budgets[row] = prompt, len(prompt), NEW
    keys = jnp.concatenate([keys, jax.random.split(jax.random.key(99), BATCH)])[:BATCH]
    state = begin(params, vocabulary, ids, lengths, budgets, keys, tail)
    if pins:
        held = np.full((BATCH, tail.maturity.shape[0]), -1, np.int32)
        held[:, list(pins)] = list(pins.values())
        state = state.replace(pinned=jnp.array(held))
    return state


def written(prompts, tail, keys, pins=None, disturb=None):
    """Tokens of each row, and of each row the tokens of every pass."""
    params, _, vocabulary = tiny.model()
    state = started(prompts, tail, keys, pins)
    tokens, counts, number = [[] for _ in prompts], [[] for _ in prompts], 0
    while not np.all(state.done):
        state = state if disturb is None else disturb(state, number)
        state, out = step(params, vocabulary, state, tail)
        for row in range(len(prompts)):
            if out.committed[row]:
                tokens[row] += np.asarray(out.tokens[row, : out.committed[row]]).tolist()
                counts[row].append(int(out.committed[row]))
        number += 1
    return tokens, counts


def referenced(prompt, one, key, pins=None):
    params, _, vocabulary = tiny.model()
    model = functools.partial(tiny.padded_forward(), params)
    return generate_by_reference(model, vocabulary, prompt, NEW, key, tail_of(reference_of(one)), (END,), pins=pins)[0]


def check(length, most, name, draft, prompts, seed, rate=None, pins=None, told=None):
    one = setting(length, most, name, draft=draft, rate=rate, model_tail_length=told)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    tokens, _ = written(prompts, tail_of(one), keys, pins)
    for row, prompt in enumerate(prompts):
        assert tokens[row] == referenced(prompt, one, keys[row], pins)


# Few tokens, so that texts repeat themselves and drafts come true.
one_prompt = st.lists(st.integers(1, 6), min_size=1, max_size=WIDTH)
drawn = {"prompts": st.lists(one_prompt, min_size=1, max_size=BATCH), "seed": st.integers(0, 100),
         "rate": st.sampled_from([None, 0.3, 1.0])}


@pytest.mark.parametrize(("length", "most", "name", "draft"), [
    (1, 1, "plain", "tail"), (4, 4, "guidance", "tail"), (4, 3, "repulsion", "lookup"), (4, 4, "history", "both"),
    (4, 2, "fresh noise", "tail"), (4, 3, "steering", "both"), (3, 3, "back steered", "tail"), (4, 4, "all", "tail"),
    (4, 4, "all", "both"), (6, 4, "all", "lookup")])
@settings(max_examples=5)
@given(**drawn)
def test_the_text_is_that_of_immediate_projection(length, most, name, draft, prompts, seed, rate):
    check(length, most, name, draft, prompts, seed, rate)


@pytest.mark.slow
@settings(max_examples=40)
@given(length=st.sampled_from([2, 4, 7]), most=st.sampled_from([2, 3, 7]), name=st.sampled_from(list(CONTROLS)),
       draft=st.sampled_from(["tail", "lookup", "both"]), told=st.sampled_from([None, 1, 5]),
       pins=st.dictionaries(st.integers(0, 6), st.integers(1, tiny.VOCAB - 1)), **drawn)
def test_the_text_is_that_of_immediate_projection_at_length(length, most, name, draft, told, pins, prompts, seed, rate):
    pins = {place: token for place, token in pins.items() if place < length}
    check(length, most, name, draft, prompts, seed, rate, pins, told)


@settings(max_examples=5)
@given(**drawn, pins=st.dictionaries(st.integers(0, 3), st.integers(1, tiny.VOCAB - 1), min_size=1))
def test_pins_are_committed_where_they_stand(prompts, seed, rate, pins):
    check(4, 4, "all", "tail", prompts, seed, rate, pins)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_right_drafts_are_accepted_and_wrong_ones_change_nothing(name):
    # The oracle's own text as drafts, then the same with one wrong token: what is written stays, the passes do not.
    one, prompt, keys = setting(4, 4, name), [5, 2, 4], jax.random.split(jax.random.key(3), 1)
    text = referenced(prompt, one, keys[0])
    assert len(text) == NEW or text[-1] == END

    def drafting(wrong):
        def disturb(state, _):
            done = int(state.num_committed[0]) - len(prompt)
            ahead = [(token + (place in wrong)) % tiny.VOCAB for place, token in enumerate(text)][done : done + 4]
            drafts = np.full((BATCH, 4), -1, np.int32)
            drafts[0, : len(ahead)] = ahead
            return state.replace(nearest=jnp.array(drafts))

        return disturb

    right, counts = written([prompt], tail_of(one), keys, disturb=drafting(()))
    assert right[0] == text
    assert counts[0] == [min(4, len(text) - begin) for begin in range(0, len(text), 4)]
    other, counts = written([prompt], tail_of(one), keys, disturb=drafting((1,)))
    assert other[0] == text
    assert counts[0][0] == 2


def test_drafts_and_slots_never_see_each_other():
    params, _, _ = tiny.model()
    tail = tail_of(setting(4, 4, "guidance"))
    state = started([[5, 2, 4], [3], [1, 6], [2]], tail, jax.random.split(jax.random.key(3), BATCH))
    predict = jax.jit(cache.cached_predict(functools.partial(tiny.model()[1], params), tail))
    drafts = jax.random.normal(jax.random.key(1), (BATCH, 3, 16))

    def asked(drafts, slots):
        checked = Drafts(jnp.zeros((BATCH, 3), jnp.int32), drafts)
        return np.asarray(predict(state.replace(drafts=checked, tail=slots))[0])

    # Outputs: after the newest, after drafts 0, 1, 2, after slots 0, 1, 2.
    before = asked(drafts, state.tail)
    for index in range(3):
        moved = asked(drafts.at[:, index].add(1.0), state.tail)
        changed = np.abs(moved - before).max((0, 2)) > 1e-6
        assert changed.tolist() == [place in range(1 + index, 4) for place in range(7)]
        moved = asked(drafts, state.tail.at[:, index].add(1.0))
        changed = np.abs(moved - before).max((0, 2)) > 1e-6
        assert changed.tolist() == [place in range(4 + index, 7) for place in range(7)]


def test_accepted_drafts_by_hand():
    committed = jnp.array([[4, 5, 6, 7]] * 4)
    drafts = jnp.array([[4, 5, 6], [4, 9, 6], [9, 5, 6], [-1, -1, -1]])
    assert num_accepted(drafts, committed).tolist() == [3, 1, 0, 0]


def test_looked_up_drafts_by_hand():
    text = jnp.array([
        [1, 2, 3, 4, 9, 1, 2, 3, 0, 0],  # 1 2 3 before: 4 9 1 followed
        [7, 8, 7, 8, 7, 8, 0, 0, 0, 0],  # a loop goes on
        [5, 6, 1, 5, 6, 2, 5, 6, 0, 0],  # the latest 5 6, whose three tokens did not occur before: 2
        [1, 2, 3, 4, 5, 6, 7, 8, 0, 0],  # nothing occurred before
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # what lies behind the text is no text
    ])
    got = look_up_drafts(text, jnp.array([8, 6, 8, 8, 1]), 3)
    np.testing.assert_array_equal(got, [[4, 9, 1], [7, 8, 7], [2, 5, 6], [-1, -1, -1], [-1, -1, -1]])


@functools.cache
def generator():
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    return Generator(tiny.CONFIG, tiny.shaken_params(vocab_size=tokenizer.vocab_size), tokenizer)


SETTINGS = GenerationConfig(tail_length=4, commit="verified", max_commit=3, draft="both", repulsion=0.2,
                            max_new_tokens=10)
PROMPTS = ["a b a b a b", [5, 6, 5, 6, 5, 6, 5], "the cat", ""]


def test_a_generator_writes_the_references_text_and_tells_how():
    samples = generator().generate(PROMPTS, SETTINGS, num_samples=2)
    plain = generator().generate(PROMPTS, reference_of(SETTINGS), num_samples=2)
    for one, other in zip(samples, plain, strict=True):
        assert (one.tokens, one.text, one.finished) == (other.tokens, other.text, other.finished)
        assert len(one.accepted) == 2
        assert one.passes + sum(one.accepted) == len(one.tokens)
        assert other.accepted == []
    assert sum(one.passes for one in samples) < sum(one.passes for one in plain)


def test_streamed_and_recorded_samples_say_what_was_checked():
    prompt, made = PROMPTS[1], generator()
    [sample] = made.generate([prompt], SETTINGS)
    moments = list(made.stream(prompt, SETTINGS))
    trajectory = made.record(prompt, SETTINGS, num_candidates=2)
    assert moments[-1].tokens == trajectory.text.tolist() == sample.tokens
    assert [one.committed for one in moments] == trajectory.committed.tolist()
    np.testing.assert_array_equal([one.drafts for one in moments], trajectory.drafts)
    for one in moments:
        right = one.drafts[: one.committed - 1]
        assert one.tokens[len(one.tokens) - one.committed :][: len(right)] == right
        assert len(one.tail) == 4 - one.committed


def test_edits_of_the_tail_change_drafts_and_a_pin_the_text():
    made, prompt = generator(), PROMPTS[2]
    settings = dataclasses.replace(SETTINGS, draft="tail")
    text = made.generate([prompt], settings)[0].tokens
    # The text itself in the slots: the first pass accepts all that it checks.
    helped = made.replace(made.begin(prompt, settings), 0, text[:3])
    helped, moment = made.step(helped)
    assert moment.committed == 3
    assert moment.tokens == text[:3]
    other = 7 if text[1] != 7 else 8
    pinned = made.pin(made.begin(prompt, settings), 1, [other])
    tokens = []
    while not pinned.done:
        pinned, moment = made.step(pinned)
        tokens = moment.tokens
    assert tokens[:2] == [text[0], other]


def test_another_value_compiles_nothing_and_another_number_of_drafts_does():
    made = generator()
    made.generate(PROMPTS[:1], SETTINGS)
    before = made.compilations()
    made.generate(PROMPTS[:1], dataclasses.replace(SETTINGS, repulsion=0.3, rate=0.5, tail_noise=0.9))
    assert made.compilations() == before
    made.generate(PROMPTS[:1], dataclasses.replace(SETTINGS, max_commit=2))
    assert made.compilations() > before
