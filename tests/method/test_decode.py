"""The decoder without a model: a predictor that always dreams of the same token, and a trajectory written by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

import tiny
from tokmat_jax.method.algorithm import Record, decode, liquid_step, refine, start_decoding
from tokmat_jax.method.history import Entry, history_noise
from tokmat_jax.method.noise import FreshNoise, embryos, fresh
from tokmat_jax.method.stability import Stability
from tokmat_jax.method.steering import Steering
from tokmat_jax.method.table import make_vocabulary

# A table on the unit sphere of the plane; token 3 ends the text.
TABLE = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
VOCABULARY = make_vocabulary(TABLE)
READ = Record(read_tail=True)
END = 3
WIDE = make_vocabulary(TABLE, radius=2.0)


def tail_of(maturity, noise=0.0, stability=None, **controls):
    tail = tiny.tail(len(maturity), tail_noise=noise, **controls)
    return tail.replace(maturity=jnp.array(maturity), rate=jnp.array(maturity), stability=stability)


def start(tail, prompt_length=2, budget=5, last=(1.0, 0.0), batch=1):
    keys = jax.random.split(jax.random.key(0), batch)
    return start_decoding(keys, jnp.full((batch, 1, 2), jnp.array([[last]])), jnp.full((batch,), prompt_length),
                          jnp.full((batch,), budget), jnp.zeros((batch,), jnp.int32), tail, 1.0)


def dream(state):
    """Slot j of a row with n committed is predicted to become token (n + j) mod 3; the memory counts the calls."""
    slots = state.num_committed[:, None] + jnp.arange(state.tail.shape[1])[None]
    return TABLE[slots % 3], state.memory + 1


def test_five_commits_by_hand():
    # K = 3, rates 1, 1/2, 1/4, embryos of zero noise: exact in binary. n starts at 2, so slot j dreams of (2+j) mod 3.
    tail = tail_of([1.0, 0.5, 0.25])
    state = start(tail)
    np.testing.assert_array_equal(state.tail, np.zeros((1, 3, 2)))
    refined = [
        # front           middle            back
        [[-1.0, 0.0], [0.5, 0.0], [0.0, 0.25]],      # n = 2 dreams 2, 0, 1
        [[1.0, 0.0], [0.0, 0.625], [-0.25, 0.0]],    # n = 3 dreams 0, 1, 2
        [[0.0, 1.0], [-0.625, 0.0], [0.25, 0.0]],    # n = 4 dreams 1, 2, 0
        [[-1.0, 0.0], [0.625, 0.0], [0.0, 0.25]],    # n = 5 dreams 2, 0, 1
        [[1.0, 0.0], [0.0, 0.625], [-0.25, 0.0]],    # n = 6 dreams 0, 1, 2
    ]
    committed = [2, 0, 1, 2, 0]
    before = np.zeros((3, 2))
    for index in range(5):
        state, step = liquid_step(state, dream, VOCABULARY, tail, (END,), READ)
        after = np.array(refined[index])
        assert step.tokens[0, 0] == committed[index]
        np.testing.assert_array_equal(state.tail[0, :2], after[1:])
        np.testing.assert_array_equal(state.tail[0, 2], [0.0, 0.0])
        np.testing.assert_array_equal(state.last[0], TABLE[committed[index]])
        np.testing.assert_array_equal(step.movement[0], np.linalg.norm(after - before, axis=-1).astype(np.float32))
        np.testing.assert_array_equal(step.tokens[0], (after @ np.asarray(TABLE).T).argmax(-1))
        assert state.num_committed[0] == 3 + index
        assert bool(state.done[0]) == (index == 4)
        before = np.concatenate([after[1:], [[0.0, 0.0]]])
    assert state.memory[0] == 5


def test_the_scan_does_what_single_steps_do():
    tail = tail_of([0.9, 0.6, 0.3], noise=0.5)
    state = start(tail, batch=2)
    final, steps = decode(state, dream, VOCABULARY, tail, (END,), 5, READ)
    for index in range(5):
        state, step = liquid_step(state, dream, VOCABULARY, tail, (END,), READ)
        chex.assert_trees_all_close(step, jax.tree.map(lambda part, i=index: part[i], steps), atol=1e-6)
    chex.assert_trees_all_close(state.tail, final.tail, atol=1e-6)


def test_a_row_stops_at_end_of_text_or_its_budget_and_changes_no_more():
    tail = tail_of([1.0, 0.5])

    def ends_at_four(state):
        slots = state.num_committed[:, None] + jnp.arange(2)[None]
        return TABLE[jnp.where(slots == 4, END, slots % 3)], state.memory

    state = start(tail, batch=3)
    state = state.replace(num_committed=jnp.array([2, 5, 5]), budget=jnp.array([9, 7, 5]),
                          done=jnp.array([False, False, True]))
    final, steps = decode(state, ends_at_four, VOCABULARY, tail, (END,), 6)
    np.testing.assert_array_equal(np.asarray(steps.committed).sum(0), [3, 2, 0])
    np.testing.assert_array_equal(steps.tokens[:3, 0, 0], [2, 0, END])
    np.testing.assert_array_equal(final.num_committed, [5, 7, 5])
    assert np.all(final.done)
    again, _ = decode(final, ends_at_four, VOCABULARY, tail, (END,), 2)
    jax.tree.map(np.testing.assert_array_equal, jax.random.key_data(again.key), jax.random.key_data(final.key))
    np.testing.assert_array_equal(again.tail, final.tail)
    np.testing.assert_array_equal(again.last, final.last)
    np.testing.assert_array_equal(again.num_born, final.num_born)
    np.testing.assert_array_equal(final.tail[2], state.tail[2])


def test_an_embryo_depends_on_its_rows_key_and_its_number_alone():
    keys = jax.random.split(jax.random.key(1), 3)
    sigma = jnp.float32(0.7)
    many = embryos(keys, jnp.zeros((3,), jnp.int32), 6, 8, sigma, 2.0)
    one = embryos(keys[1:2], jnp.array([4]), 1, 8, sigma, 2.0)
    np.testing.assert_array_equal(many[1, 4], one[0, 0])
    assert len(np.unique(np.asarray(many).reshape(18, 8), axis=0)) == 18


def test_the_tails_rate_is_its_maturity():
    tail = tiny.tail(4, max_maturity=0.8)
    np.testing.assert_allclose(tail.maturity, [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(tail.rate, tail.maturity)


def test_a_rate_of_its_own_leaves_the_maturity_alone():
    tail = tiny.tail(4, max_maturity=0.8, rate=1.0)
    np.testing.assert_allclose(tail.maturity, [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(tail.rate, [1.0, 0.75, 0.5, 0.25], rtol=1e-6)


def test_history_noise_disturbs_what_enters_the_history_and_no_token():
    plain, noisy = tail_of([1.0, 0.5]), tail_of([1.0, 0.5], history_noise=0.5)
    one, _ = liquid_step(start(plain, batch=2), dream, VOCABULARY, plain, (END,))
    two, step = liquid_step(start(noisy, batch=2), dream, VOCABULARY, noisy, (END,))
    np.testing.assert_array_equal(one.last, TABLE[step.tokens[:, 0]])
    np.testing.assert_array_equal(one.tail, two.tail)
    moved = np.asarray(two.last - one.last)
    again = history_noise(start(noisy, batch=2).key, jnp.array([2, 2]), 2, jnp.float32(0.5), 1.0)
    np.testing.assert_allclose(moved, again, atol=1e-6)
    assert (np.linalg.norm(moved, axis=-1) > 0).all()


def test_fresh_noise_disturbs_a_slot_by_what_it_lacks_of_maturity_and_anew_at_every_step():
    plain, noisy = tail_of([1.0, 0.5, 0.0]), tail_of([1.0, 0.5, 0.0], fresh_noise=0.8)
    seen = []
    for number in range(2):
        state = start(plain, prompt_length=2 + number, batch=2)
        one = refine(state, dream(state)[0], WIDE, plain)
        two = refine(state, dream(state)[0], WIDE, noisy)
        seen.append(np.asarray(two - one))
    np.testing.assert_array_equal(seen[0][:, 0], 0.0)
    assert len(np.unique(np.concatenate(seen).reshape(-1, 3, 2)[:, 1:].reshape(-1, 2), axis=0)) == 8
    keys = jax.random.split(jax.random.key(5), 4000)
    numbers = jnp.full((4000, 3), 7)
    drawn = np.asarray(fresh(keys, numbers, jnp.arange(3), noisy.maturity, noisy.fresh_noise, 2, 2.0))
    size = np.sqrt(np.mean(np.sum(drawn**2, -1), axis=0))
    # σ_f R (1 − α) for each slot, up to four standard errors of the root of 4,000 squares.
    np.testing.assert_allclose(size, [0.0, 0.8, 1.6], rtol=2 / 4000**0.5)


def test_steering_draws_the_chosen_slots_and_so_what_is_committed():
    plain = tail_of([1.0, 0.5])
    towards = plain.replace(steering=tiny.tail(
        2, TABLE[1] - TABLE[2], steering=2.0, steering_slots=(0,), max_new_tokens=5).steering)
    state = start(plain)
    refined = refine(state, dream(state)[0], VOCABULARY, towards)
    # The front dreams of token 2 at (−1, 0) and is drawn by 2 along (1, 1)/√2; the back dreams of token 0 as before.
    np.testing.assert_allclose(refined[0], [[2**0.5 - 1, 2**0.5], [0.5, 0.0]], atol=1e-6)
    _, step = liquid_step(state, dream, VOCABULARY, towards, (END,))
    assert step.tokens[0, 0] == 1


def test_a_pinned_slot_is_its_token_until_it_is_committed_and_free_again_behind_it():
    tail = tail_of([1.0, 0.5, 0.25])
    state = start(tail, budget=4).replace(pinned=jnp.array([[-1, 3, -1]]))
    state, step = liquid_step(state, dream, VOCABULARY, tail, ends=(9,),
                              record=Record(read_tail=True, keep_vectors=True))
    np.testing.assert_array_equal(step.vectors[0, 1], TABLE[3])
    assert step.tokens[0, :2].tolist() == [2, 3]
    np.testing.assert_array_equal(state.pinned, [[3, -1, -1]])
    state, step = liquid_step(state, dream, VOCABULARY, tail, ends=(9,))
    assert step.tokens[0, 0] == 3
    np.testing.assert_array_equal(state.last, TABLE[3][None])
    np.testing.assert_array_equal(state.pinned, [[-1, -1, -1]])
    _, step = liquid_step(state, dream, VOCABULARY, tail, ends=(9,))
    assert step.tokens[0, 0] == 1


def test_stable_commits_by_hand():
    # Every slot dreams of its own token from birth on: at rate 1 it stands still from its second update.
    tail = tail_of([1.0, 1.0, 1.0, 1.0], stability=Stability(jnp.int32(1), jnp.float32(0.5)))
    state = start(tail, budget=7).replace(recent=jnp.zeros((1, 3, 2)))
    committed = []
    while not state.done[0]:
        state, step = liquid_step(state, dream, VOCABULARY, tail, (END,))
        committed.append(int(step.committed[0]))
    # First nothing has settled: one. Then the three older slots have, and the newest not; the same again; the rest.
    assert committed == [1, 3, 1, 2]
    np.testing.assert_array_equal(state.recent[0], TABLE[np.arange(6, 9) % 3])
    assert state.num_born[0] == 4 + 7
    assert state.num_committed[0] == 9


def settling_of(tokens, budget=9):
    """A tail of four slots that says `tokens` and, with rate 0, stays as it is; three of them may go at once."""
    tail = tail_of([0.0] * 4, stability=Stability(jnp.int32(0), jnp.float32(9.0)))
    return tail, start(tail, budget=budget).replace(recent=jnp.zeros((1, 3, 2)), tail=TABLE[jnp.array([tokens])])


def test_an_end_of_text_inside_a_settled_run_is_the_last_of_it():
    tail, state = settling_of([1, END, 2, 0])
    state, step = liquid_step(state, dream, VOCABULARY, tail, (END,))
    assert (int(step.committed[0]), bool(state.done[0]), int(state.num_committed[0])) == (2, True, 4)
    np.testing.assert_array_equal(state.recent[0, 1:], TABLE[np.array([1, END])])


def test_an_end_of_text_in_a_slot_that_is_not_committed_ends_nothing():
    tail, state = settling_of([1, END, 2, 0])
    tail = tail.replace(stability=Stability(jnp.int32(1), jnp.float32(9.0)))
    state, step = liquid_step(state, dream, VOCABULARY, tail, (END,))
    assert (int(step.committed[0]), bool(state.done[0])) == (1, False)


def test_a_settled_run_never_goes_beyond_the_budget():
    tail, state = settling_of([1, 2, 0, 1], budget=2)
    state, step = liquid_step(state, dream, VOCABULARY, tail, (END,))
    assert (int(step.committed[0]), bool(state.done[0])) == (2, True)


NEUTRAL = {"guidance_scale": 1.0, "repulsion": 0.0, "fresh_noise": 0.0, "history_noise": 0.0, "history_smoothing": 0.0}


def test_neutral_controls_are_the_plain_algorithm():
    # Nothing of them is left in the tail, so that the very same program runs.
    plain, neutral = tiny.tail(4), tiny.tail(4, **NEUTRAL)
    assert jax.tree.structure(plain) == jax.tree.structure(neutral)
    chex.assert_trees_all_equal(plain, neutral)


def test_controls_that_run_with_neutral_values_change_no_bit():
    plain = tail_of([0.9, 0.6, 0.3], noise=0.5)
    zero = jnp.float32(0.0)
    still = Steering(TABLE[1], jnp.zeros(3), jnp.float32(1.0), jnp.float32(1.0), jnp.float32(5.0))
    running = plain.replace(fresh_noise=FreshNoise(zero), entry=Entry(zero, zero), steering=still,
                            stability=Stability(jnp.int32(0), jnp.float32(1e9)))
    # One operation after the other: two programs may be fused, and so rounded, differently.
    with jax.disable_jit():
        ends = [decode(start(tail, batch=2), dream, VOCABULARY, tail, (END,), 5, READ)
                for tail in (plain, running)]
    chex.assert_trees_all_equal(ends[0][1], ends[1][1])
    np.testing.assert_array_equal(ends[0][0].tail, ends[1][0].tail)


def test_a_rate_per_slot():
    np.testing.assert_allclose(tiny.tail(3, rate=(0.9, 0.1, 0.5)).rate, [0.9, 0.1, 0.5], rtol=1e-6)
