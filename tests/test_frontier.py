import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.evaluation.frontier import Point, front, log_perplexity_at, signed_area

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
