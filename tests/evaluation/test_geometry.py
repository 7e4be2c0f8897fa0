import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.evaluation import geometry

seeds = st.integers(0, 2**32 - 1)


def table(seed, rows=30, dim=5):
    """Rows of several lengths, off centre."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.0, (rows, dim)) * rng.uniform(0.5, 2.0, (rows, 1))


def turned(rows, degrees):
    """The rows turned by an angle in every plane of two neighbouring coordinates."""
    turn = np.eye(rows.shape[1])
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for i in range(0, len(turn), 2):
        turn[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    return rows @ turn


def cosines(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def naive_nearest(rows, k):
    cosine = cosines(rows)
    return [set(sorted(set(range(len(rows))) - {i}, key=lambda j: -cosine[i, j])[:k]) for i in range(len(rows))]


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 30.0, 90.0, 180.0])
def test_the_drift_of_a_turned_table_is_its_angle(degrees):
    before = table(0, dim=6)
    np.testing.assert_allclose(geometry.drift(before, 3.0 * turned(before, degrees)), degrees, rtol=1e-6, atol=1e-10)


def test_drift_by_hand():
    before = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    after = np.array([[1.0, 1.0], [0.0, 9.0], [-1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(geometry.drift(before, after), [45.0, 0.0, 180.0, 90.0])


def test_nearest_changes_by_hand():
    # At 0°, 10°, 30° and 180°. Nearest are 1, 0, 1 and 2. Row 2 goes to 4°: nearest are 2, 2, 0 and 1: all new.
    # Row 3 goes to 35°: nearest are 1, 0, 3 and 2: one of four is new.
    def at(*degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

    before = at(0, 10, 30, 180)
    assert geometry.nearest_changes(before, at(0, 10, 4, 180)) == 1.0
    assert geometry.nearest_changes(before, at(0, 10, 30, 35)) == 0.25
    assert geometry.nearest_changes(before, 2.0 * at(0, 10, 30, 180)) == 0.0
    # Of the two nearest: {1, 2}, {0, 2}, {0, 1} and {1, 2} before; {1, 2}, {0, 2}, {3, 1} and {2, 1} after.
    assert geometry.nearest_changes(before, at(0, 10, 30, 35), k=2) == 1 / 8


@given(seeds, st.integers(1, 29))
def test_nearest_changes_is_the_share_of_new_neighbours(seed, k):
    before, after = table(seed), table(seed) + table(seed + 1)
    old, new = naive_nearest(before, k), naive_nearest(after, k)
    want = np.mean([len(b - a) / k for a, b in zip(old, new, strict=True)])
    assert geometry.nearest_changes(before, after, k) == pytest.approx(want)
    assert geometry.nearest_changes(before, before, k) == 0.0


@pytest.mark.parametrize("k", [0, 3])
def test_neighbours_are_other_rows(k):
    with pytest.raises(ValueError, match="from 1 to 2"):
        geometry.nearest_changes(np.eye(3), np.eye(3), k)
    with pytest.raises(ValueError, match="from 1 to 2"):
        geometry.hubness(np.eye(3), k)


def test_isotropy_of_a_cross_by_hand():
    # ± the axes, d = 3: cosines are −1 for 3 of 15 pairs and else 0; every direction has e + 1/e + 4; the
    # covariance is a multiple of the identity.
    cross = 5.0 * np.concatenate([np.eye(3), -np.eye(3)])
    got = geometry.isotropy(cross)
    assert got == pytest.approx({"mean_cosine": -1 / 5, "partition_ratio": 1.0, "effective_dimensions": 3.0})


def test_isotropy_of_a_leaning_table_by_hand():
    # Three times (1, 0) and once (0, 1): 3 of 6 pairs have cosine 1. Eigenvectors are the axes: Z is 3e + 1 and
    # 3/e + 1 along the first, e + 3 and 1/e + 3 along the second. All variance is along (1, −1).
    got = geometry.isotropy(2.0 * np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    ratio = (3 / math.e + 1) / (3 * math.e + 1)
    assert got == pytest.approx({"mean_cosine": 0.5, "partition_ratio": ratio, "effective_dimensions": 1.0})


@given(seeds)
def test_isotropy_is_its_definition(seed):
    rows = table(seed)
    got = geometry.isotropy(rows)
    cosine = cosines(rows)
    assert got["mean_cosine"] == pytest.approx(cosine[~np.eye(30, dtype=bool)].mean())
    scaled = rows / np.linalg.norm(rows, axis=1).mean()
    directions = np.linalg.svd(scaled)[2]
    z = [np.exp(scaled @ (sign * c)).sum() for c in directions for sign in (1, -1)]
    assert got["partition_ratio"] == pytest.approx(min(z) / max(z))
    spectrum = np.linalg.eigvalsh(np.cov((rows / np.linalg.norm(rows, axis=1, keepdims=True)).T))
    assert got["effective_dimensions"] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum())
    assert 1 <= got["effective_dimensions"] <= 5


@given(seeds, st.floats(0.01, 100.0))
def test_isotropy_does_not_depend_on_scale(seed, scale):
    assert geometry.isotropy(scale * table(seed)) == pytest.approx(geometry.isotropy(table(seed)))


def test_rows_that_point_the_same_way_have_no_dimensions():
    got = geometry.isotropy(np.array([[0.1, 0.7]]) * np.arange(1, 8)[:, None])
    assert math.isnan(got["effective_dimensions"])
    assert got["mean_cosine"] == pytest.approx(1.0)


def test_a_planted_hub_is_found():
    # Row 0 leans towards every axis, a little more to the first; the axes (rows 1 to 7) are orthogonal to each other,
    # and row 8 has cosine 0.44 with row 0 and at most 0.32 with an axis. So all have row 0 nearest, and row 0 row 1.
    rows = np.concatenate([np.full((1, 7), 1.0) + 0.1 * np.eye(7)[:1], np.eye(7), [[-1.0] + 6 * [0.5]]])
    got = geometry.hubness(rows, k=1)
    n = np.array([8, 1, 0, 0, 0, 0, 0, 0, 0])
    skewness = np.mean((n - 1) ** 3) / np.mean((n - 1) ** 2) ** 1.5
    assert got == pytest.approx({"skewness": skewness, "largest_hub": 8.0, "antihubs": 7 / 9})


def test_a_ring_has_no_hub():
    angle = np.arange(12) * math.pi / 6
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert geometry.hubness(ring, k=2) == {"skewness": 0.0, "largest_hub": 1.0, "antihubs": 0.0}


@given(seeds, st.integers(1, 29))
def test_hubness_is_its_definition(seed, k):
    rows = table(seed)
    neighbours = naive_nearest(rows, k)
    n = np.array([sum(i in of_row for of_row in neighbours) for i in range(30)])
    got = geometry.hubness(rows, k)
    assert got["largest_hub"] == n.max() / k
    assert got["antihubs"] == np.mean(n == 0)
    if n.std():
        assert got["skewness"] == pytest.approx(np.mean((n - k) ** 3) / n.std() ** 3)


def test_blocks_of_rows_change_nothing(monkeypatch):
    before, after = table(3), table(4)

    def everything():
        return [
            *geometry.drift(before, after),
            geometry.nearest_changes(before, after, 3),
            *geometry.isotropy(before).values(),
            *geometry.hubness(before, 4).values(),
        ]

    whole = everything()
    monkeypatch.setattr(geometry, "_ROWS", 7)
    np.testing.assert_allclose(everything(), whole, rtol=1e-12)
