"""Repetition, diversity, loops, BrierLM and bootstrap intervals, all from tokens or words (METHOD §5)."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def _ngrams(items: Sequence, n: int) -> list[tuple]:
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def distinct(tokens: Sequence[int], n: int) -> float:
    """Dist-n in (0, 1] of one sample: unique n-grams / n-grams (Li et al. 2016, arXiv:1510.03055, per sample).

    NaN if there are fewer than n tokens. It falls with the length of the sample: only compare equal lengths.
    """
    ngrams = _ngrams(tokens, n)
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(tokens: Sequence[int], n: int) -> float:
    """Rep-n = 1 − Dist-n in [0, 1) of one sample: seq-rep-n on tokens (Welleck et al. 2019, arXiv:1908.04319)."""
    return 1.0 - distinct(tokens, n)


def repeats_a_trigram(tokens: Sequence[int]) -> bool:
    """Whether any trigram occurs twice: the article's loop. True for most human texts of 128 tokens (METHOD §5)."""
    return distinct(tokens, 3) < 1.0


def ends_in_a_cycle(tokens: Sequence[int], times: int = 3) -> bool:
    """Whether the sample ends with one cycle, of any period ≥ 1, `times` times in a row: periodic loop (METHOD §5)."""
    tokens = list(tokens)
    for period in range(1, len(tokens) // times + 1):
        end = tokens[len(tokens) - period * times :]
        if end[period:] == end[:-period]:
            return True
    return False


def pooled_counts(texts: Sequence[str], n: int) -> np.ndarray:
    """Number of unique and of all n-grams in each text [N, 2]; words are separated by white space."""
    ngrams = [_ngrams(text.split(), n) for text in texts]
    return np.array([(len(set(of_text)), len(of_text)) for of_text in ngrams], np.int64).reshape(-1, 2)


def pooled_repetition(counts: np.ndarray) -> float:
    """SimCTG's rep-n in [0, 1) over texts: 1 − Σ unique / Σ total (Su et al. 2022, arXiv:2202.06417).

    `counts` [N, 2] are their `pooled_counts`: n-grams are unique within their own text, and the sums go over the texts,
    so that long texts count more. The paper prints it in percent. The authors' script drops the last n-gram of each
    text; this follows the paper's equation, which does not. NaN if no text has n words.
    """
    unique, total = counts.sum(0)
    return float(1.0 - unique / total) if total else math.nan


def diversity(counts: Sequence[np.ndarray]) -> float:
    """SimCTG's diversity in (0, 1]: Π (1 − rep-n) of the `pooled_counts` for n = 2, 3, 4."""
    return math.prod(1.0 - pooled_repetition(one) for one in counts)


def brier(samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Unbiased Brier-n [N] for n = 1..N of one context, each in [−1, 1] (CALM, arXiv:2510.27688).

    `samples` [S, N]: the first N tokens of S ≥ 2 independent continuations; `reference` [N]: the true ones. With
    x_i, y the first n tokens, the mean over all pairs i ≠ j of 1{x_i = y} + 1{x_j = y} − 1{x_i = x_j}. Its expectation
    is 2 p(y) − Σ p(x)², which is largest, in expectation over y, if p is the true distribution.
    """
    count = len(samples)
    if count < 2:
        raise ValueError(f"Brier-n compares samples with each other and needs at least 2 of them, not {count}")
    right = np.logical_and.accumulate(samples == reference, axis=-1)
    same = np.logical_and.accumulate(samples[:, None] == samples[None], axis=-1)
    collisions = (same.sum((0, 1)) - count) / (count * (count - 1))
    return 2.0 * right.mean(0) - collisions


def brier_lm(per_context: np.ndarray) -> float:
    """BrierLM in (0, 100]: 100 · (Π_n mean over contexts of Brier-n)^(1/N), from `brier` of each context [C, N].

    NaN if one of the N means is not positive. That is so for a deterministic decoder unless more than half of its first
    tokens are right: all its samples are equal, so its Brier-1 is 2 · (share that is right) − 1.
    """
    means = np.mean(per_context, axis=0)
    return 100.0 * float(np.exp(np.mean(np.log(means)))) if np.all(means > 0) else math.nan


def bootstrap(
    values_of: Callable[[np.ndarray], float], count: int, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a statistic over `count` ≥ 1 prompts (Efron 1979).

    `values_of` computes it from the indices [count] of prompts drawn with replacement. Resamples with a NaN are
    dropped; (NaN, NaN) if all are NaN.
    """
    return _interval(np.array([values_of(drawn) for drawn in _draws(count, resamples, seed)]), level)


def bootstrap_mean(
    values: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """`bootstrap` of the mean of `values` [count], one per prompt; prompts with a NaN are ignored."""
    drawn = np.asarray(values, np.float64)[_draws(len(values), resamples, seed)]
    known = ~np.isnan(drawn)
    with np.errstate(invalid="ignore"):
        means = np.sum(drawn, axis=1, where=known) / np.sum(known, axis=1)
    return _interval(means, level)


def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _interval(statistics: np.ndarray, level: float) -> tuple[float, float]:
    known = statistics[~np.isnan(statistics)]
    if known.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)
