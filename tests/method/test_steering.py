"""Steering by hand: where it draws to, which slots, when, and how far."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.config import GenerationConfig
from tokmat_jax.method.steering import direction_of, make_steering, steer

NORTH = jnp.array([0.0, 2.0])


def along_north(strength, slots, schedule, tail_length, budget):
    return make_steering(GenerationConfig(
        tail_length=tail_length, steering=strength, steering_slots=slots, steering_schedule=schedule,
        max_new_tokens=budget), NORTH)


def test_all_slots_by_strength_and_radius_whatever_the_length_of_the_direction():
    steering = along_north(0.5, (), "constant", 3, 10)
    got = steer(jnp.zeros((1, 3, 2)), jnp.array([[10.0, 9.0, 8.0]]), steering, 4.0)
    np.testing.assert_allclose(got[0], [[0.0, 2.0]] * 3, rtol=1e-6)


def test_chosen_slots_alone():
    steering = along_north(-0.5, (0, 2), "constant", 3, 10)
    got = steer(jnp.ones((1, 3, 2)), jnp.array([[10.0, 9.0, 8.0]]), steering, 1.0)
    np.testing.assert_allclose(got[0], [[1.0, 0.5], [1.0, 1.0], [1.0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(("schedule", "weights"), [
    ("constant", [1.0, 1.0, 1.0, 1.0]), ("fade", [1.0, 0.5, 0.0, 0.0]), ("rise", [0.0, 0.5, 1.0, 1.0])])
def test_schedules_run_from_the_first_token_to_the_last_of_the_budget_and_stay_there(schedule, weights):
    # Five tokens; slots that will be tokens 1, 3 and 5, and one behind the budget.
    steering = along_north(1.0, (), schedule, 4, 5)
    got = steer(jnp.zeros((1, 4, 2)), jnp.array([[5.0, 3.0, 1.0, 0.0]]), steering, 1.0)
    np.testing.assert_allclose(got[0, :, 1], weights, atol=1e-6)


@given(budget=st.integers(1, 50), left=st.integers(-5, 50), schedule=st.sampled_from(["constant", "fade", "rise"]))
def test_nothing_is_drawn_further_than_the_strength(budget, left, schedule):
    steering = along_north(0.3, (), schedule, 1, budget)
    moved = steer(jnp.zeros((1, 1, 2)), jnp.full((1, 1), float(min(left, budget))), steering, 2.0)
    assert np.linalg.norm(moved) <= 0.6 * (1 + 1e-6)


def test_words_count_alike_whatever_their_length():
    np.testing.assert_allclose(direction_of(jnp.array([[3.0, 0.0], [0.0, 0.5]])), [0.5, 0.5], rtol=1e-6)
