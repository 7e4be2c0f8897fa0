"""No sample ends before its `min_new_tokens`, however it is decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from tokmat_jax.method.algorithm import Record, decode, start_decoding
from tokmat_jax.method.ending import Barred
from tokmat_jax.method.table import make_vocabulary, read

# The plane again; tokens 2 and 3 end a text, and every prediction is nearest to token 3, then to token 2.
VOCABULARY = make_vocabulary(jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
ENDS = (2, 3)
DREAM = jnp.array([-0.1, -1.0])
COMMITS = {"front": {}, "stable": {"commit": "stable", "patience": 0, "tolerance": 9.0},
           "verified": {"commit": "verified", "draft": "tail", "max_commit": 3}}


def dream(state):
    """The same prediction for every slot and draft."""
    count = state.tail.shape[1] + (0 if state.drafts is None else state.drafts.tokens.shape[1])
    return jnp.broadcast_to(DREAM, (len(state.tail), count, 2)), state.memory


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("least", [0, 1, 4, 9])
def test_the_first_token_that_ends_a_sample_comes_after_the_least_number(commit, least):
    tail = tiny.tail(3, tail_noise=0.0, rate=1.0, max_new_tokens=6, min_new_tokens=least, **COMMITS[commit])
    state = start_decoding(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 1 if commit != "stable" else 3, 2)),
                           jnp.array([2, 5]), jnp.array([6, 6]), jnp.zeros(()), tail, 1.0)
    state, steps = decode(state, dream, VOCABULARY, tail, ENDS, 6, Record(read_tail=True))
    for row in range(2):
        tokens = [token for step in range(6)
                  for token in np.asarray(steps.tokens[step, row, : steps.committed[step, row]]).tolist()]
        assert tokens == [0] * min(least, 6) + ([3] if least < 6 else [])
    assert np.all(state.done)
    assert least != 4 or (np.asarray(steps.committed) > 1).any() == (commit != "front")


def test_a_barred_token_is_no_candidate_and_still_counts_in_the_entropy():
    z = jnp.stack([DREAM, DREAM, -DREAM])
    free, entropy = read(z, VOCABULARY, 0.5)
    assert free.tolist() == [3, 3, 1]
    tokens, same = read(z, VOCABULARY, 0.5, Barred(ENDS, jnp.array([True, False, True])))
    assert tokens.tolist() == [0, 3, 1]
    np.testing.assert_array_equal(same, entropy)


def test_barred_tokens_of_a_vocabulary_in_pieces(monkeypatch):
    monkeypatch.setattr("tokmat_jax.method.table._SMALLEST_PIECE", 16)
    monkeypatch.setattr("tokmat_jax.method.table._AT_ONCE", 16)
    rows = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    z, places = rows[:8], np.arange(8) % 2 == 0
    ends = tuple(range(0, 100, 3))
    tokens, _ = read(jnp.asarray(z), make_vocabulary(jnp.asarray(rows)), 1.0, Barred(ends, jnp.asarray(places)))
    inner = z @ rows.T
    inner[places[:, None] & np.isin(np.arange(100), ends)] = -np.inf
    np.testing.assert_array_equal(tokens, inner.argmax(-1))
