import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.config import ObjectiveConfig
from tokmat_jax.method import losses
from tokmat_jax.method.table import sphere

V, D = 12, 5


def example(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    table = sphere(jax.random.normal(keys[0], (V, D)), 2.0)
    return jax.random.normal(keys[1], (2, 3, D)), jax.random.randint(keys[2], (2, 3), 0, V), table


def counted_once(ids):
    return losses.Negatives(jnp.array(ids), jnp.zeros(len(ids)))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_regression_by_hand():
    got = losses.regression(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]]), 2.0)
    np.testing.assert_allclose(got, [1.0])


@pytest.mark.parametrize("negatives", [[0, 3, 3, 7], list(range(V))], ids=["with a repeat", "full"])
def test_info_nce_is_the_equation(negatives):
    prediction, ids, table = example()
    got = losses.info_nce(prediction, ids, table, counted_once(negatives), jnp.float32(7.0))
    z, e = np.asarray(prediction, np.float64), np.asarray(table, np.float64)
    for b in range(2):
        for t in range(3):
            target = int(ids[b, t])
            positive = np.exp(7.0 * cosine(z[b, t], e[target]))
            others = sum(np.exp(7.0 * cosine(z[b, t], e[j])) for j in negatives if j != target)
            np.testing.assert_allclose(got[b, t], -np.log(positive / (positive + others)), rtol=1e-5)


def test_a_target_without_other_negatives_costs_nothing_and_has_a_finite_gradient():
    prediction, ids, table = example()
    ids = jnp.full_like(ids, 3)

    def total(z):
        return jnp.sum(losses.info_nce(z, ids, table, counted_once([3, 3]), jnp.float32(20.0)))

    value, gradient = jax.value_and_grad(total)(prediction)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_full_negatives_equal_the_cross_entropy_of_scaled_cosines():
    prediction, ids, table = example(1)
    unit = prediction / jnp.linalg.norm(prediction, axis=-1, keepdims=True)
    nce = losses.info_nce(prediction, ids, table, losses.all_of(V), jnp.float32(9.0))
    # ⟨ẑ/‖ẑ‖ · R, e⟩ / R² is the cosine.
    entropy = losses.cross_entropy(2.0 * unit, ids, table, jnp.float32(9.0 / 2.0**2))
    np.testing.assert_allclose(nce, entropy, rtol=1e-5)


def test_cross_entropy_is_the_equation():
    prediction, ids, table = example(2)
    got = losses.cross_entropy(prediction, ids, table, jnp.float32(0.75))
    logits = 0.75 * np.asarray(prediction, np.float64) @ np.asarray(table, np.float64).T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.asarray(ids)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def draws(negatives, power=0.75):
    config = ObjectiveConfig(negatives=negatives, num_negatives=20_000, unigram_power=power)
    unigram = jnp.array([0.0, 0.1, 0.4, 0.5])
    targets = jnp.array([[1, 1, 1, 3]])
    return np.bincount(losses.draw_negatives(jax.random.key(0), config, targets, unigram).ids, minlength=4) / 20_000


# Five standard errors of a share of 20,000 draws are at most 5·√(0.25/20000) < 0.018.
def test_uniform_negatives_cover_the_vocabulary_evenly():
    np.testing.assert_allclose(draws("uniform"), [0.25] * 4, atol=0.018)


def test_batch_negatives_follow_the_targets_of_the_batch():
    np.testing.assert_allclose(draws("batch"), [0, 0.75, 0, 0.25], atol=0.018)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_unigram_negatives_follow_the_power_of_the_counts(power):
    weight = np.array([0.0, 0.1, 0.4, 0.5]) ** power
    np.testing.assert_allclose(draws("unigram", power), weight / weight.sum(), atol=0.018)


def test_full_negatives_are_all_of_the_vocabulary():
    config = ObjectiveConfig(negatives="full", num_negatives=2)
    got = losses.draw_negatives(jax.random.key(0), config, jnp.zeros((1, 2), jnp.int32), jnp.ones(5) / 5)
    assert got.ids is None
    np.testing.assert_array_equal(got.log_weight, np.zeros(5))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weighted_negatives_are_what_many_from_unigram_come_to(power):
    prediction, ids, table = example(3)
    unigram = jnp.arange(1.0, V + 1) / (V * (V + 1) / 2)
    config = ObjectiveConfig(negatives="weighted", unigram_power=power)
    weighted = losses.draw_negatives(jax.random.key(0), config, ids, unigram)
    got = losses.info_nce(prediction, ids, table, weighted, jnp.float32(3.0))
    share = np.arange(1.0, V + 1) ** power
    share /= share.sum()
    z, e = np.asarray(prediction, np.float64), np.asarray(table, np.float64)
    for b, t in np.ndindex(2, 3):
        target = int(ids[b, t])
        terms = [np.exp(3.0 * cosine(z[b, t], e[j])) for j in range(V)]
        others = V * sum(share[j] * terms[j] for j in range(V) if j != target)
        np.testing.assert_allclose(got[b, t], -np.log(terms[target] / (terms[target] + others)), rtol=1e-5)
    if power == 0.0:
        full = losses.info_nce(prediction, ids, table, losses.all_of(V), jnp.float32(3.0))
        np.testing.assert_allclose(got, full, rtol=1e-5)


def test_a_token_that_never_occurs_is_no_weighted_negative():
    prediction, ids, table = example(4)
    config = ObjectiveConfig(negatives="weighted", unigram_power=1.0)
    unigram = jnp.zeros(V).at[:3].set(1 / 3)

    def total(z):
        return jnp.sum(losses.info_nce(z, jnp.full_like(ids, 5), table, losses.draw_negatives(
            jax.random.key(0), config, ids, unigram), jnp.float32(20.0)))

    value, gradient = jax.value_and_grad(total)(prediction)
    assert np.isfinite(gradient).all()
    # The three that occur count V/3 times each, and nothing else does.
    among = losses.Negatives(jnp.arange(3), jnp.full(3, jnp.log(V / 3)))
    want = jnp.sum(losses.info_nce(prediction, jnp.full_like(ids, 5), table, among, jnp.float32(20.0)))
    np.testing.assert_allclose(value, want, rtol=1e-5)


def each_position(function, shape):
    """A sum over positions, read off position by position."""
    weights = jnp.eye(np.prod(shape)).reshape(-1, *shape)
    return jax.vmap(function)(weights).reshape(shape)


NEGATIVES = [losses.Negatives(jnp.array([0, 3, 3, 7]), jnp.zeros(4)), losses.all_of(V),
             losses.Negatives(None, jnp.linspace(-2.0, 1.0, V))]


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("negatives", NEGATIVES, ids=["drawn", "full", "weighted"])
def test_the_sum_over_pieces_is_the_sum_of_the_positions_with_its_gradient(monkeypatch, negatives, pieces):
    monkeypatch.setattr(losses, "_AT_ONCE", 2 * len(negatives.log_weight) * -(-3 // pieces))
    prediction, ids, table = example(5)
    weight = jnp.array([[1.0, 0.5, 0.0], [0.25, 1.0, 2.0]])
    kappa = jnp.float32(6.0)

    def summed(weight, *args):
        return losses.summed_info_nce(args[0], ids, args[1], negatives, args[2], weight, jnp.dtype("float32"))

    def plain(*args):
        return jnp.sum(weight * losses.info_nce(args[0], ids, args[1], negatives, args[2]))

    want = losses.info_nce(prediction, ids, table, negatives, kappa)
    np.testing.assert_allclose(each_position(lambda w: summed(w, prediction, table, kappa), ids.shape), want, rtol=1e-5)
    arguments = (prediction, table, kappa)
    got = jax.value_and_grad(lambda *args: summed(weight, *args), (0, 1, 2))(*arguments)
    want = jax.value_and_grad(plain, (0, 1, 2))(*arguments)
    # Sums of six terms of size κ = 6 in float32.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=6e-6), got, want)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_summed_cross_entropy_is_the_sum_of_the_positions_with_its_gradient(monkeypatch, pieces):
    monkeypatch.setattr(losses, "_AT_ONCE", 2 * V * -(-3 // pieces))
    prediction, ids, table = example(6)
    weight = jnp.array([[1.0, 0.5, 0.0], [0.25, 1.0, 2.0]])
    scale = jnp.float32(0.75)

    def summed(prediction, table, scale):
        return losses.summed_cross_entropy(prediction, ids, table, scale, weight, jnp.dtype("float32"))

    def plain(*args):
        return jnp.sum(weight * losses.cross_entropy(args[0], ids, args[1], args[2]))

    got = jax.value_and_grad(summed, (0, 1, 2))(prediction, table, scale)
    want = jax.value_and_grad(plain, (0, 1, 2))(prediction, table, scale)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=6e-6), got, want)
