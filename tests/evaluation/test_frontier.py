import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.evaluation.frontier import (
    Point,
    Settings,
    front,
    interval_of_area,
    log_perplexity_at,
    signed_area,
)

E = math.e
points = st.lists(
    st.builds(Point, st.just("p"), st.integers(0, 8).map(lambda i: i / 8), st.sampled_from([1.5, 2.0, 4.0, 9.0, 30.0])),
    max_size=8,
)


def curve(*pairs):
    return [Point(f"{r}", r, perplexity) for r, perplexity in pairs]


def beats(a, b):
    return a.repetition <= b.repetition and a.perplexity <= b.perplexity and (a != b)


def test_a_front_by_hand():
    best = curve((0.1, 40.0), (0.3, 20.0), (0.7, 5.0))
    beaten = curve((0.2, 40.0), (0.3, 21.0), (0.5, 20.0), (0.9, 6.0))
    assert front([beaten[0], best[2], beaten[1], best[0], beaten[2], best[1], beaten[3]]) == best


@given(points)
def test_the_front_is_what_nothing_beats(cloud):
    want = [p for p in cloud if not any(beats(q, p) for q in cloud)]
    got = front(cloud)
    assert sorted(got, key=repr) == sorted(want, key=repr)
    assert [p.repetition for p in got] == sorted(p.repetition for p in got)


def test_settings_that_measure_the_same_both_stay():
    twins = [Point("a", 0.2, 9.0), Point("b", 0.2, 9.0)]
    assert front(twins) == twins
    assert log_perplexity_at(front(twins), 0.2) == pytest.approx(math.log(9.0))


def test_what_was_not_measured_is_not_on_the_front():
    known = Point("known", 0.5, 7.0)
    assert front([Point("a", math.nan, 1.0), known, Point("b", 0.1, math.nan), Point("c", 0.1, math.inf)]) == [known]
    assert front([]) == []


def test_the_front_between_left_and_right_of_its_points():
    points = curve((0.2, E**4), (0.6, E**2), (0.8, E**1.5))
    assert log_perplexity_at(points, 0.2) == pytest.approx(4.0)
    assert log_perplexity_at(points, 0.3) == pytest.approx(3.5)
    assert log_perplexity_at(points, 0.7) == pytest.approx(1.75)
    assert log_perplexity_at(points, 0.95) == pytest.approx(1.5)
    assert math.isnan(log_perplexity_at(points, 0.19))


def test_parallel_fronts_are_as_far_apart_as_they_are_high():
    baseline = curve((0.0, E**3), (1.0, E**2))
    ours = curve((0.2, E**1.8), (0.7, E**1.3))
    area = signed_area(baseline, ours)
    # At 0.2 the baseline is at 2.8 nats, at 0.7 at 2.3: one nat above ours all along [0.2, 0.7].
    assert dataclasses.astuple(area) == pytest.approx((0.5, 1.0, 0.2, 0.7))


def test_crossing_fronts_by_hand():
    baseline = curve((0.0, E**2), (1.0, E**1))
    ours = curve((0.0, E**3), (0.5, E**2.5), (1.0, E**0))
    # In nats at 0, 0.5 and 1: baseline 2, 1.5, 1; ours 3, 2.5, 0; differences −1, −1, 1; trapezoids −0.5 and 0.
    assert dataclasses.astuple(signed_area(baseline, ours)) == pytest.approx((-0.5, -0.5, 0.0, 1.0))


def test_beaten_points_do_not_move_the_area():
    baseline, ours = curve((0.0, 30.0), (1.0, 10.0)), curve((0.1, 20.0), (0.9, 8.0))
    beaten = curve((0.2, 90.0), (0.95, 50.0))
    assert signed_area(baseline + beaten, beaten + ours) == signed_area(baseline, ours)


@pytest.mark.parametrize(
    ("baseline", "ours"),
    [
        (curve((0.0, 9.0), (0.3, 4.0)), curve((0.4, 9.0), (0.8, 4.0))),
        (curve((0.0, 9.0), (0.4, 4.0)), curve((0.4, 9.0), (0.8, 4.0))),
        (curve((0.0, 9.0), (0.3, 4.0)), curve((0.1, 9.0))),
        (curve((0.0, 9.0), (0.3, 4.0)), []),
    ],
    ids=["apart", "touching", "single", "empty"],
)
def test_fronts_without_a_common_stretch_have_no_area(baseline, ours):
    assert np.isnan(dataclasses.astuple(signed_area(baseline, ours))).all()
    assert np.isnan(dataclasses.astuple(signed_area(ours, baseline))).all()


@given(points, points)
def test_the_area_changes_its_sign_with_the_sides(one, other):
    there, back = signed_area(one, other), signed_area(other, one)
    np.testing.assert_array_equal([there.area, there.mean_gain], [-back.area, -back.mean_gain])
    np.testing.assert_array_equal([there.low, there.high], [back.low, back.high])


@given(points, points)
def test_the_area_is_the_integral_of_the_difference(one, other):
    area = signed_area(one, other)
    if math.isnan(area.area):
        return
    # All knots are multiples of 1/8, so that midpoints of 1/64 steps integrate straight pieces exactly.
    middles = np.arange(area.low + 1 / 128, area.high, 1 / 64)
    ahead = [log_perplexity_at(front(one), x) - log_perplexity_at(front(other), x) for x in middles]
    assert np.sum(ahead) / 64 == pytest.approx(area.area, abs=1e-9)
    assert np.mean(ahead) == pytest.approx(area.mean_gain, abs=1e-9)


@given(points, st.sampled_from([0.5, 2.0]))
def test_halving_the_perplexity_everywhere_gains_log_two(cloud, factor):
    ours = [Point(p.label, p.repetition, factor * p.perplexity) for p in cloud]
    gain = signed_area(cloud, ours).mean_gain
    if len({p.repetition for p in front(cloud)}) > 1:
        assert gain == pytest.approx(-math.log(factor))
    else:
        assert math.isnan(gain)


# Settings of one family on the same prompts. Two settings, three prompts; a sample that ended early has no repetition.
NAN = math.nan
FAMILY = Settings(
    ["a", "b"], np.array([[0.2, 0.4, NAN], [0.9, 0.5, 0.1]]), np.array([[2.0, 4.0, 6.0], [3.0, 3.0, 3.0]]),
    np.array([[1, 2, 1], [3, 1, 2]]))


def test_the_points_of_settings_by_hand():
    # a: repetition of the two that are known; 12 nats of 4 tokens, the unknown one's included. b: 9 nats of 6.
    a, b = FAMILY.points()
    assert (a.label, b.label) == ("a", "b")
    assert dataclasses.astuple(a)[1:] == pytest.approx((0.3, E**3))
    assert dataclasses.astuple(b)[1:] == pytest.approx((0.5, E**1.5))


def test_points_over_chosen_prompts_count_each_as_often_as_it_was_drawn():
    a, b = FAMILY.points(np.array([0, 0, 1]))
    # a: (0.2 + 0.2 + 0.4) / 3 and 8 nats of 4 tokens; b: (0.9 + 0.9 + 0.5) / 3 and 9 nats of 7.
    assert dataclasses.astuple(a)[1:] == pytest.approx((0.8 / 3, E**2))
    assert dataclasses.astuple(b)[1:] == pytest.approx((2.3 / 3, math.exp(9 / 7)))


def test_a_setting_of_which_nothing_is_known_is_not_on_the_front():
    alone = FAMILY.points(np.array([2, 2, 2]))
    assert math.isnan(alone[0].repetition)
    assert front(alone) == [alone[1]]
    silent = Settings(["a"], np.array([[0.5]]), np.array([[0.0]]), np.array([[0]]))
    assert math.isnan(silent.points()[0].perplexity)
    assert front(silent.points()) == []


def test_only_keeps_the_settings_named_in_their_order():
    one = FAMILY.only([1])
    assert one.points() == FAMILY.points()[1:]
    assert [point.label for point in FAMILY.only([1, 0]).points()] == ["b", "a"]
    assert FAMILY.only([1, 0]).points()[1] == FAMILY.points()[0]


def family(shift, prompts=40, seed=0):
    """Three settings from (0.1, 3 nats) to (0.9, 2 nats) a token, noise in every sample, `shift` nats up."""
    rng = np.random.default_rng(seed)
    repetition = np.array([0.1, 0.5, 0.9])[:, None] + rng.normal(0, 0.05, (3, prompts))
    nats = np.array([3.0, 2.5, 2.0])[:, None] + shift + rng.normal(0, 0.3, (3, prompts))
    return Settings(["x", "y", "z"], repetition, 10 * nats, np.full((3, prompts), 10))


def test_the_same_family_on_both_sides_has_no_area_in_any_resample():
    assert interval_of_area(family(0.0), family(0.0), resamples=50) == (0.0, 0.0)


def test_families_that_differ_by_chance_alone_may_be_equal():
    low, high = interval_of_area(family(0.0, seed=1), family(0.0, seed=2), resamples=200)
    assert low < 0 < high


def test_families_that_are_apart_are_told_apart_with_their_sign():
    # A nat per token over a stretch of about 0.8; the error of a point's mean is 0.3/√40 ≈ 0.05 nats.
    better, worse = family(0.0, seed=1), family(1.0, seed=2)
    low, high = interval_of_area(worse, better, resamples=200)
    assert 0.6 < low < signed_area(worse.points(), better.points()).area < high < 1.0
    assert interval_of_area(better, worse, resamples=200) == pytest.approx((-high, -low))


def test_prompts_are_resampled_for_both_sides_together():
    # Each prompt is as much harder for the one as for the other: pairing takes that out, and the area is certain.
    hardness = np.random.default_rng(5).normal(0, 1.0, 40)
    one, other = family(0.0), family(1.0)
    one = dataclasses.replace(one, nats=one.nats + 10 * hardness)
    other = dataclasses.replace(other, nats=other.nats + 10 * hardness)
    low, high = interval_of_area(other, one, resamples=200)
    assert high - low < 0.1


def test_the_intervals_seed_decides_it():
    one, other = family(0.0, seed=1), family(0.2, seed=2)
    assert interval_of_area(one, other, 50, seed=4) == interval_of_area(one, other, 50, seed=4)
    assert interval_of_area(one, other, 50, seed=4) != interval_of_area(one, other, 50, seed=5)
