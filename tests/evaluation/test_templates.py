import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.evaluation import templates

samples_of_few_tokens = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=6)
_ = None


def without_gaps(row):
    return [token for token in row if token is not None]


def best(one, other, match):
    """The score of the best alignment, by recursion: mismatch and gap −1."""

    @functools.cache
    def score(i, j):
        if i == 0 or j == 0:
            return -i - j
        pair = match if one[i - 1] == other[j - 1] else -1
        return max(score(i - 1, j - 1) + pair, score(i - 1, j) - 1, score(i, j - 1) - 1)

    return score(len(one), len(other))


def medoid(samples):
    distances = [-sum(best(one, other, 0) for other in samples) for one in samples]
    return distances.index(min(distances))


def score_of(one, other):
    """What two rows of one table score, columns that are empty in both left out."""
    columns = [(a, b) for a, b in zip(one, other, strict=True) if (a, b) != (None, None)]
    return sum(1 if a == b else -1 for a, b in columns)


def test_samples_of_one_template_by_hand():
    # The first is the centre: 2 edits from the second (a 9 more, 4 → 7), 1 from the third (no 2), 1 from the fourth.
    samples = [[1, 2, 3, 4], [1, 2, 9, 3, 7], [1, 3, 4], [8, 1, 2, 3, 4]]
    aligned = templates.align(samples)
    assert aligned == [
        [_, 1, 2, _, 3, 4],
        [_, 1, 2, 9, 3, 7],
        [_, 1, _, _, 3, 4],
        [8, 1, 2, _, 3, 4],
    ]
    assert templates.stable_columns(aligned) == [_, 1, 2, _, 3, 4]
    assert templates.stable_columns(aligned, share=1.0) == [_, 1, _, _, 3, _]
    assert templates.stable_columns(aligned, share=0.25) == [8, 1, 2, 9, 3, 4]
    # 4 + 5 + 3 + 5 tokens, all but 9, 7 and 8 stable.
    assert templates.stability(aligned) == pytest.approx(14 / 17)


def test_tokens_that_the_centre_lacks_share_columns_from_the_left():
    aligned = templates.align([[1, 2], [1, 5, 6, 2], [1, 7, 2], [1, 2], [1, 2, 3]])
    assert aligned == [
        [1, _, _, 2, _],
        [1, 5, 6, 2, _],
        [1, 7, _, 2, _],
        [1, _, _, 2, _],
        [1, _, _, 2, 3],
    ]


def test_of_equally_good_alignments_the_later_pair_is_taken():
    # 1 could stand under either 1 of the centre, and the extra 1 of the last row before or behind.
    assert templates.align([[1, 1], [1], [1, 1], [1, 1, 1]]) == [[_, 1, 1], [_, _, 1], [_, 1, 1], [1, 1, 1]]


@given(samples_of_few_tokens)
def test_rows_are_equally_long_and_without_their_gaps_the_samples(samples):
    aligned = templates.align(samples)
    assert [without_gaps(row) for row in aligned] == samples
    assert len({len(row) for row in aligned}) == 1
    assert all(without_gaps(column) for column in zip(*aligned, strict=True))


@given(samples_of_few_tokens)
def test_every_sample_is_aligned_with_the_medoid_as_well_as_can_be(samples):
    aligned = templates.align(samples)
    centre = medoid(samples)
    for sample, row in zip(samples, aligned, strict=True):
        assert score_of(aligned[centre], row) == best(samples[centre], sample, 1)


@given(samples_of_few_tokens, st.sampled_from([0.3, 0.5, 0.9]))
def test_a_stable_token_is_the_most_frequent_of_its_column_and_in_enough_rows(samples, share):
    aligned = templates.align(samples)
    for column, token in zip(zip(*aligned, strict=True), templates.stable_columns(aligned, share), strict=True):
        most = max(column.count(t) for t in without_gaps(column))
        if token is None:
            assert most / len(column) < share
        else:
            assert column.count(token) == most >= share * len(column)


def test_of_equally_frequent_tokens_the_smallest_is_stable_whatever_the_order():
    assert templates.stable_columns([[5], [3]]) == templates.stable_columns([[3], [5]]) == [3]


def from_a_template(count, seed=0):
    """Tokens 1..6 with one to three other tokens after 2 and after 4."""
    rng = np.random.default_rng(seed)

    def slot():
        return rng.integers(100, 10_000, rng.integers(1, 4)).tolist()

    return [[1, 2, *slot(), 3, 4, *slot(), 5, 6] for _ in range(count)]


def test_a_template_is_read_off_its_samples():
    samples = from_a_template(30)
    aligned = templates.align(samples)
    assert without_gaps(templates.stable_columns(aligned)) == [1, 2, 3, 4, 5, 6]
    assert templates.stability(aligned) == pytest.approx(30 * 6 / sum(map(len, samples)))
    assert templates.shuffled_stability(samples, seed=0) < 0.5 * templates.stability(aligned)


def test_equal_samples_are_all_stable():
    aligned = templates.align([[4, 4, 2]] * 5)
    assert aligned == [[4, 4, 2]] * 5
    assert templates.stability(aligned) == 1.0


def test_shuffling_keeps_each_samples_tokens_and_follows_the_seed():
    samples = from_a_template(8)
    assert templates.shuffled_stability(samples, seed=1) == templates.shuffled_stability(samples, seed=1)
    assert len({templates.shuffled_stability(samples, seed) for seed in range(5)}) > 1
    # Nothing to permute: each sample has one token only, so chance is all there is.
    assert templates.shuffled_stability([[7] * 3, [7] * 3, [8]], seed=0) == 6 / 7


def test_chance_alone_explains_samples_without_an_order():
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 5, (20, 12)).tolist()
    chance = np.mean([templates.shuffled_stability(samples, seed) for seed in range(5)])
    assert templates.stability(templates.align(samples)) == pytest.approx(chance, abs=0.1)


def test_nothing_to_align():
    assert templates.align([]) == []
    assert templates.align([[], []]) == [[], []]
    assert templates.align([[], [3], []]) == [[_], [3], [_]]
    assert math.isnan(templates.stability(templates.align([[], []])))
    assert math.isnan(templates.shuffled_stability([], seed=0))
