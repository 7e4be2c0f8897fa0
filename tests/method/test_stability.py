"""When slots have settled, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.method.ending import up_to_end
from tokmat_jax.method.stability import Settling, Stability, settle, settled_run, unborn


def test_a_slot_counts_the_updates_that_left_its_token_as_it_was():
    settling, alive = unborn(1, 3), jnp.array([False])
    expected = [([4, 5, 6], [0, 0, 0]), ([4, 7, 6], [1, 0, 1]), ([4, 7, 9], [2, 1, 0]), ([1, 7, 9], [0, 2, 1])]
    for said, unchanged in expected:
        settling = settle(settling, jnp.array([said]), alive)
        np.testing.assert_array_equal(settling.nearest, [said])
        np.testing.assert_array_equal(settling.unchanged, [unchanged])
    stopped = settle(settling, jnp.array([[8, 8, 8]]), jnp.array([True]))
    np.testing.assert_array_equal(stopped.nearest, settling.nearest)
    np.testing.assert_array_equal(stopped.unchanged, settling.unchanged)


@pytest.mark.parametrize(("patience", "tolerance", "run"), [
    (2, 0.5, 2), (3, 0.5, 1), (4, 0.5, 0), (0, 0.2, 1), (0, 0.15, 0), (0, 9.0, 4), (1, 9.0, 2)])
def test_the_run_ends_at_the_first_slot_that_has_not_settled(patience, tolerance, run):
    settling = Settling(jnp.zeros((1, 4), jnp.int32), jnp.array([[3, 2, 0, 5]]))
    movement = jnp.array([[0.15, 0.3, 0.1, 0.1]])
    got = settled_run(settling, movement, Stability(jnp.int32(patience), jnp.float32(tolerance)))
    assert got.tolist() == [run]


@pytest.mark.parametrize(("tokens", "count"), [([1, 2, 3], 3), ([1, 0, 3], 2), ([0, 0, 0], 1), ([1, 2, 0], 3)])
def test_nothing_behind_the_first_end_of_text_is_committed(tokens, count):
    assert up_to_end(jnp.array([tokens]), (0,)).tolist() == [count]
