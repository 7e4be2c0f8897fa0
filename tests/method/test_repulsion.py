"""Repulsion: its formula by hand, when it does nothing, and what it does to a text that loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax.method import repulsion
from tokmat_jax.method.algorithm import decode, start_decoding
from tokmat_jax.method.table import make_vocabulary

TABLE = jnp.eye(4)
END = 3


def trace_of(predicted, committed):
    """A trace of one row; position 0 has no prediction."""
    return repulsion.Trace(jnp.array([predicted], jnp.float32), jnp.array([committed], jnp.float32))


def pushing(strength, sharpness):
    return repulsion.Repulsion(jnp.float32(strength), jnp.float32(sharpness))


def test_the_push_by_hand():
    # Two places: the same prediction as now (cosine 1, counts 1) and one at right angles (counts e^-2).
    trace = trace_of([[9, 9, 0], [1, 0, 0], [0, 1, 0]], [[9, 9, 9], [0, 0, 1], [0, 1, 0]])
    got = repulsion.push(jnp.array([[[2.0, 0, 0]]]), trace, jnp.array([[3]]), pushing(0.5, 2.0))
    share = np.exp(-2.0)
    expected = np.array([2.0, 0, 0]) - 0.5 * 2.0 * np.array([0, share, 1.0]) / (1.0 + share)
    np.testing.assert_allclose(got[0, 0], expected, rtol=1e-6)


def test_a_place_that_is_hardly_alike_pushes_less_than_its_share():
    # One place alone, at right angles: its weight e^-2 is below 1 and is not blown up to 1.
    trace = trace_of([[0, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 0, 1]])
    got = repulsion.push(jnp.array([[[1.0, 0, 0]]]), trace, jnp.array([[2]]), pushing(1.0, 2.0))
    np.testing.assert_allclose(got[0, 0], [1.0, 0.0, -np.exp(-2.0)], rtol=1e-6)


@given(seed=st.integers(0, 1000), n=st.integers(1, 6), strength=st.floats(0.0, 2.0), sharpness=st.floats(0.1, 50.0))
@settings(max_examples=30, deadline=None)
def test_it_never_pushes_further_than_its_strength_and_reads_committed_positions_alone(seed, n, strength, sharpness):
    keys = jax.random.split(jax.random.key(seed), 4)
    prediction = jax.random.normal(keys[0], (1, 3, 5))
    predicted, committed, other = (repulsion.unit(jax.random.normal(key, (1, 6, 5))) for key in keys[1:])

    def push(a, b):
        return repulsion.push(prediction, repulsion.Trace(a, b), jnp.full((1, 3), n), pushing(strength, sharpness))

    got = push(predicted, committed)
    moved = np.linalg.norm(got - prediction, axis=-1)
    # Rounding of a sum of at most 6 terms, relative to the norm.
    assert np.all(moved <= strength * np.linalg.norm(prediction, axis=-1) * (1 + 1e-5) + 1e-6)
    live = (jnp.arange(6) < n)[None, :, None]
    np.testing.assert_array_equal(got, push(jnp.where(live, predicted, other), jnp.where(live, committed, other)))
    if n == 1:
        np.testing.assert_array_equal(got, prediction)


def always(token):
    """A `predict` that dreams of one token wherever it is; nothing is remembered of the model itself."""
    def predict(state):
        count = state.tail.shape[1]
        lean = TABLE[token] + 0.1 * TABLE[(token + 1) % 3] + 0.05 * TABLE[(token + 2) % 3]
        return jnp.broadcast_to(lean, (state.last.shape[0], count, 4)), state.memory

    return predict


def run(strength, length=1, steps=6):
    tail = tiny.tail(length, profile="constant", max_maturity=1.0, tail_noise=0.0, repulsion=strength)
    vectors = TABLE[jnp.array([[2]])]
    trace = repulsion.begin_trace(jnp.zeros((1, 1, 4)), vectors, 16)
    state = start_decoding(jax.random.split(jax.random.key(0), 1), vectors[:, -1:], jnp.array([1]), jnp.array([steps]),
                           repulsion.Remembering(jnp.int32(0), trace), tail, 1.0)
    predict = repulsion.repel(always(0), pushing(strength, 10.0))
    return decode(state, predict, make_vocabulary(TABLE), tail, (END,), steps)


def test_the_same_place_commits_another_token_the_next_time():
    # What stood there shares the push: 0 first (nothing to push from), then its runner-up, then the third.
    assert np.asarray(run(3.0)[1].tokens)[:, 0, 0].tolist()[:3] == [0, 1, 2]
    assert np.asarray(run(0.0)[1].tokens)[:, 0, 0].tolist() == [0] * 6


def test_the_trace_keeps_what_was_predicted_before_the_push_and_what_was_committed():
    state, steps = run(1.5)
    trace = state.memory.trace
    tokens = np.asarray(steps.tokens)[:, 0, 0]
    lean = np.array([1.0, 0.1, 0.05, 0.0])
    np.testing.assert_allclose(trace.predicted[0, 1:7], np.tile(lean / np.linalg.norm(lean), (6, 1)), rtol=1e-6)
    np.testing.assert_allclose(trace.committed[0, 1:6], np.asarray(TABLE)[tokens[:5]], rtol=1e-6)


@pytest.mark.parametrize("capacity", [3, 4, 9])
def test_the_trace_of_a_prompt_has_room_for_the_position_behind_it(capacity):
    prediction, vectors = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    trace = repulsion.begin_trace(prediction, vectors, capacity)
    assert trace.predicted.shape == trace.committed.shape == (1, max(capacity, 4), 4)
    np.testing.assert_allclose(trace.predicted[0, 1:4], repulsion.unit(prediction[0]), rtol=1e-6)
    np.testing.assert_allclose(trace.committed[0, :3], repulsion.unit(vectors[0]), rtol=1e-6)
