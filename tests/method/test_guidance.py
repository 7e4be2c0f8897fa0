import jax.numpy as jnp
import numpy as np

from tokmat_jax.method import guidance
from tokmat_jax.model.attention import history_mask


def test_guidance_is_off_at_one_and_extrapolates_beyond():
    conditional, free = jnp.array([3.0]), jnp.array([1.0])
    np.testing.assert_array_equal(guidance.combine(conditional, free, 1.0), [3.0])
    np.testing.assert_array_equal(guidance.combine(conditional, free, 2.0), [5.0])
    np.testing.assert_array_equal(guidance.combine(conditional, free, 0.0), [1.0])


def test_guide_keeps_the_memory_of_the_conditional_pass():
    # The conditional pass predicts two committed positions more; guidance leaves them out.
    seen, free = jnp.array([[7.0, 8.0, 1.0, 2.0]])[..., None], jnp.array([[0.0, 1.0]])[..., None]
    predict = guidance.guide(lambda s: (seen, "conditional"), lambda s: (free, "unconditional"),
                             guidance.Guidance(jnp.float32(3.0)))
    prediction, memory = predict(None)
    np.testing.assert_array_equal(prediction[0, :, 0], [3.0, 4.0])
    assert memory == "conditional"


def test_history_mask_by_hand():
    # Five positions, three committed: the last committed one is 2. The second row drops its history.
    got = history_mask(5, jnp.array([3, 3]), jnp.array([False, True])).astype(int)
    causal = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    dropped = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(got, [causal, dropped])
