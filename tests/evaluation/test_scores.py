"""The report's columns from samples made by hand."""

import math
import os

import numpy as np
import pytest

from tokmat_jax.evaluation import metrics, scores
from tokmat_jax.evaluation.methods import Written
from tokmat_jax.evaluation.scores import COLUMNS, Value, brier_values, values

NEW = 7
# abcabcd has 4 unique tokens of 7, bigrams 4 of 6, trigrams 4 of 5, 4-grams 4 of 4; it repeats abc.
# fghijkk has 6 of 7, 6 of 6, …: nothing repeats but k. The third sample is short: it ended after two tokens.
ABCABCD, FGHIJKK, SHORT = [1, 2, 3, 1, 2, 3, 4], [6, 7, 8, 9, 10, 11, 11], [5, 5]
WRITTEN = Written([ABCABCD, FGHIJKK, SHORT], [False, False, True], [4.0, 5.0, 3.0])
TEXTS = ["a b c a b c d", "f g h i j k k", "e e e e e e e e"]
# The judge's tokens are its own: 4, 2 and 1 of them cost 4, 6 and 5 nats.
NATS, JUDGE_TOKENS = np.array([4.0, 6.0, 5.0]), np.array([4, 2, 1])


@pytest.fixture(scope="module")
def found():
    return values(WRITTEN, TEXTS, NATS, JUDGE_TOKENS, NEW, resamples=200)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dist_1", (4 / 7 + 6 / 7) / 2),
        ("dist_2", (4 / 6 + 1) / 2),
        ("dist_3", (4 / 5 + 1) / 2),
        ("rep_2", (2 / 6 + 0) / 2),
        ("rep_3", (1 / 5 + 0) / 2),
        ("rep_4", 0.0),
        ("loop", 1 / 2),
        ("periodic_loop", 0.0),
        # Summed over both full texts: 10 unique of 12 bigrams, 9 of 10 trigrams, 8 of 8.
        ("simctg_rep_2", 2 / 12),
        ("simctg_rep_3", 1 / 10),
        ("simctg_rep_4", 0.0),
        ("diversity", 10 / 12 * 9 / 10),
        # All three count from here on.
        ("length", (7 + 7 + 2) / 3),
        ("ended", 1 / 3),
        ("entropy", (4.0 + 5.0 + 3.0) / 3),
        # 15 nats of 7 tokens; the mean of the three perplexities would be e¹ + e³ + e⁵ over 3, far above.
        ("judge_perplexity", math.exp(15 / 7)),
    ],
)
def test_columns_by_hand(found, name, value):
    assert found[name].value == pytest.approx(value)


def test_there_is_a_value_for_every_column_and_its_interval_contains_it(found):
    assert set(found) == {column.key for column in COLUMNS}
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    for value in found.values():
        assert value.low <= value.value <= value.high


def test_an_interval_is_the_bootstrap_over_prompts(found):
    def perplexity(chosen):
        return math.exp(NATS[chosen].sum() / JUDGE_TOKENS[chosen].sum())

    want = metrics.bootstrap(perplexity, 3, resamples=200)
    assert (found["judge_perplexity"].low, found["judge_perplexity"].high) == pytest.approx(want)
    # Lengths 7, 7, 2: of 27 resamples one in 27 has 2 as its mean, more than 2.5 %; none exceeds 7.
    assert (found["length"].low, found["length"].high) == (2.0, 7.0)


def test_samples_that_loop_are_counted_by_both_rules():
    # 1 2 | 9 8 9 8 9 8: the end is (9 8) three times, and the trigram 9 8 9 occurs twice.
    looping, once = [1, 9, 8, 9, 8, 9, 8], [1, 2, 3, 4, 5, 6, 7]
    got = values(Written([looping, once, once, once], [False] * 4, None), [""] * 4, np.ones(4), np.ones(4), NEW, 10)
    assert (got["loop"].value, got["periodic_loop"].value) == (0.25, 0.25)


def test_where_no_sample_is_full_repetition_is_not_a_number():
    written = Written([[1, 2], []], [True, True], None)
    got = values(written, ["a b", ""], np.array([3.0, 0.0]), np.array([2, 0]), NEW, resamples=50)
    repetition = {"dist_1", "dist_2", "dist_3", "rep_2", "rep_3", "rep_4", "loop", "periodic_loop", "simctg_rep_2",
                  "simctg_rep_3", "simctg_rep_4", "diversity", "entropy"}
    for name, value in got.items():
        assert all(math.isnan(x) for x in (value.value, value.low, value.high)) == (name in repetition)
    assert got["length"].value == 1.0
    assert got["ended"].value == 1.0
    # Resamples in which only the empty sample was drawn have no perplexity and are left out.
    assert got["judge_perplexity"] == Value(*[pytest.approx(math.exp(1.5))] * 3)


def test_a_full_sample_is_one_of_exactly_that_many_tokens():
    per_prompt = scores.per_prompt(Written([ABCABCD[:6], ABCABCD, [*ABCABCD, 1]], [False] * 3, None), NEW)
    assert np.isnan(per_prompt["rep_3"]).tolist() == [True, False, True]
    assert per_prompt["length"].tolist() == [6.0, 7.0, 8.0]


def test_the_mean_of_what_is_known():
    assert scores.nan_mean(np.array([1.0, math.nan, 4.0])) == 2.5
    assert math.isnan(scores.nan_mean(np.array([math.nan])))


# Two prompts with two contexts each; Brier-1 and Brier-2 of every context.
PER_CONTEXT = np.array([[0.9, 0.5], [0.7, 0.3], [0.3, 0.1], [0.1, -0.1]])


def test_brier_by_hand():
    got = brier_values(PER_CONTEXT, 2, resamples=400)
    assert set(got) == {"brier_1", "brier_2", "brier_lm"}
    assert got["brier_1"].value == pytest.approx(0.5)
    assert got["brier_2"].value == pytest.approx(0.2)
    # 100 √(0.5 · 0.2)
    assert got["brier_lm"].value == pytest.approx(100 * math.sqrt(0.1))


def test_prompts_are_resampled_with_their_contexts():
    # Of two prompts a quarter of the resamples holds the first alone, a quarter the second: their own means are the
    # ends. Contexts drawn one by one would reach down to 0.1 and up to 0.9.
    got = brier_values(PER_CONTEXT, 2, resamples=400)
    assert (got["brier_1"].low, got["brier_1"].high) == (pytest.approx(0.2), pytest.approx(0.8))
    assert (got["brier_2"].low, got["brier_2"].high) == (pytest.approx(0.0), pytest.approx(0.4))
    # The second prompt alone has a Brier-2 of 0 and no BrierLM; the others are between all and the first alone.
    assert (got["brier_lm"].low, got["brier_lm"].high) == (
        pytest.approx(100 * math.sqrt(0.1)), pytest.approx(100 * math.sqrt(0.32)))


def test_a_decoder_without_luck_has_no_brier_lm():
    got = brier_values(np.array([[-0.5, 0.2], [-0.5, 0.2]]), 1, resamples=20)
    assert got["brier_1"] == Value(-0.5, -0.5, -0.5)
    assert math.isnan(got["brier_lm"].value)


@pytest.fixture(scope="module")
def endings():
    return np.random.default_rng(0).normal(size=(40, 4))


def test_the_same_texts_score_near_one_and_far_ones_near_zero(endings):
    pytest.importorskip("mauve", reason="MAUVE is an extra: pip install -e '.[mauve]'")
    same = scores.mauve(endings, endings, seeds=2)
    far = scores.mauve(endings, endings + 100.0, seeds=2)
    assert same is not None
    assert far is not None
    assert same[0] == pytest.approx(1.0, abs=1e-6)
    # With two clusters and nothing in common the area under the curve exp(−5 KL) is next to nothing.
    assert far[0] < 0.05
    assert same[1] == pytest.approx(0.0, abs=1e-6)


def test_what_the_clustering_writes_is_not_seen_and_what_comes_after_is(endings, capfd):
    pytest.importorskip("mauve", reason="MAUVE is an extra: pip install -e '.[mauve]'")
    print("before")
    scores.mauve(endings, endings + 1.0, seeds=1)
    os.write(1, b"out\n")
    os.write(2, b"err\n")
    print("after")
    assert capfd.readouterr() == ("before\nout\nafter\n", "err\n")


def test_the_streams_come_back_after_an_error_too(capfd):
    def fail():
        with scores._quiet():
            os.write(1, b"lost\n")
            os.write(2, b"lost\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    os.write(1, b"out\n")
    os.write(2, b"err\n")
    assert capfd.readouterr() == ("out\n", "err\n")
