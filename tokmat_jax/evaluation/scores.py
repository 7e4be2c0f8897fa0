"""Computes the columns of the report from a method's samples, each with its interval over prompts (METHOD §5)."""

import contextlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokmat_jax.evaluation import metrics
from tokmat_jax.evaluation.methods import Written


@dataclass(frozen=True)
class Column:
    """One number per method."""

    key: str
    title: str
    meaning: str
    """Definition and source."""
    percent: bool = False


_DIST = "unique n-grams / n-grams of a sample's tokens, mean over samples of exactly L tokens (Li et al. 2016)"
_REP = "1 − Dist-n (Welleck et al. 2019)"
_SIMCTG = "words; unique and total n-grams summed over samples (SimCTG, Su et al. 2022)"
COLUMNS = (
    Column("dist_1", "Dist-1", _DIST),
    Column("dist_2", "Dist-2", _DIST),
    Column("dist_3", "Dist-3", _DIST),
    Column("rep_2", "Rep-2", _REP),
    Column("rep_3", "Rep-3", _REP),
    Column("rep_4", "Rep-4", _REP),
    Column("simctg_rep_2", "SimCTG rep-2", f"1 − unique / total 2-grams of {_SIMCTG}"),
    Column("simctg_rep_3", "SimCTG rep-3", f"the same for 3-grams of {_SIMCTG}"),
    Column("simctg_rep_4", "SimCTG rep-4", f"the same for 4-grams of {_SIMCTG}"),
    Column("diversity", "SimCTG diversity", f"Π (1 − rep-n), n = 2, 3, 4, of {_SIMCTG}"),
    Column("loop", "Loop% (any trigram)", "samples with any repeated trigram (the article's rule)", percent=True),
    Column("periodic_loop", "Loop% (periodic)", "samples whose end is one cycle at least 3 times", percent=True),
    Column("entropy", "entropy", "mean entropy of softmax(cos(z̃, E)/τ) at commit, nats"),
    Column("judge_perplexity", "judge ppl", "exp of the judge's mean nats per token of its own, over all samples"),
    Column("length", "length", "tokens before end-of-text"),
    Column("ended", "EOS", "samples that ended by themselves", percent=True),
)


@dataclass(frozen=True)
class Value:
    """A number and its 95 % percentile interval over resampled prompts; NaN if there is nothing to measure."""

    value: float
    low: float
    high: float


def per_prompt(written: Written, new_tokens: int) -> dict[str, np.ndarray]:
    """Arrays [N] of the measures that need only one sample; repetition is NaN if the sample is shorter than L."""

    def of_full(measure: Callable[[list[int]], float]) -> np.ndarray:
        return np.array([measure(t) if len(t) == new_tokens else math.nan for t in written.tokens], np.float64)

    found = {f"dist_{n}": of_full(lambda t, n=n: metrics.distinct(t, n)) for n in (1, 2, 3)}
    found |= {f"rep_{n}": of_full(lambda t, n=n: metrics.repetition(t, n)) for n in (2, 3, 4)}
    found["loop"] = of_full(metrics.repeats_a_trigram)
    found["periodic_loop"] = of_full(metrics.ends_in_a_cycle)
    found["length"] = np.array([len(t) for t in written.tokens], np.float64)
    found["ended"] = np.array(written.finished, np.float64)
    found["entropy"] = np.full(len(written.tokens), math.nan) if written.entropy is None else np.array(written.entropy)
    return found


def values(
    written: Written, texts: Sequence[str], nats: np.ndarray, judge_tokens: np.ndarray, new_tokens: int, resamples: int,
) -> dict[str, Value]:
    """Every column of one method. `texts` [N] are its samples as text, `nats` [N] the total nats of each under the
    judge, and `judge_tokens` [N] the number of judge tokens in each."""
    found = {name: Value(nan_mean(array), *metrics.bootstrap_mean(array, resamples))
             for name, array in per_prompt(written, new_tokens).items()}
    count = len(texts)
    full = np.array([len(tokens) == new_tokens for tokens in written.tokens])
    pooled = {n: metrics.pooled_counts(texts, n) * full[:, None] for n in (2, 3, 4)}

    for n, counts in pooled.items():
        found[f"simctg_rep_{n}"] = value(
            lambda chosen, counts=counts: metrics.pooled_repetition(counts[chosen]), count, resamples)
    found["diversity"] = value(
        lambda chosen: metrics.diversity([counts[chosen] for counts in pooled.values()]), count, resamples)

    def perplexity(chosen: np.ndarray) -> float:
        total = judge_tokens[chosen].sum()
        return float(np.exp(nats[chosen].sum() / total)) if total else math.nan

    found["judge_perplexity"] = value(perplexity, count, resamples)
    return found


def nan_mean(array: np.ndarray) -> float:
    """Mean of the values of `array` that are not NaN; NaN if there are none."""
    known = array[~np.isnan(array)]
    return float(known.mean()) if known.size else math.nan


def value(statistic: Callable[[np.ndarray], float], count: int, resamples: int) -> Value:
    """The `statistic` of the indices of all `count` prompts, with its interval."""
    return Value(float(statistic(np.arange(count))), *metrics.bootstrap(statistic, count, resamples))


def brier_values(per_context: np.ndarray, contexts_per_prompt: int, resamples: int) -> dict[str, Value]:
    """Brier-1 .. Brier-N and BrierLM from Brier-n of each context [C, N], resampling prompts with their contexts."""
    grouped = per_context.reshape(-1, contexts_per_prompt, per_context.shape[-1])
    count = len(grouped)

    def mean(chosen: np.ndarray, n: int) -> float:
        return float(grouped[chosen, :, n].mean())

    found = {f"brier_{n + 1}": value(lambda chosen, n=n: mean(chosen, n), count, resamples)
             for n in range(per_context.shape[-1])}
    found["brier_lm"] = value(
        lambda chosen: metrics.brier_lm(grouped[chosen].reshape(-1, per_context.shape[-1])), count, resamples)
    return found


FEWEST_FOR_MAUVE = 40
"""Minimum number of texts for MAUVE: it makes a tenth as many clusters, and fewer than four are meaningless."""


def has_mauve() -> bool:
    """Whether the package of the extra `mauve` is installed."""
    return importlib.util.find_spec("mauve") is not None


def mauve(human: np.ndarray, other: np.ndarray, seeds: int = 5) -> tuple[float, float]:
    """MAUVE (Pillutla et al. 2021) between endings [N, d] of human and other texts, mean and spread over k-means seeds.

    Needs the package, see `has_mauve`.
    """
    # Imported by name: a type checker would take minutes for the libraries that it imports.
    package = importlib.import_module("mauve")
    with _quiet():
        found = [package.compute_mauve(p_features=human, q_features=other, seed=seed, verbose=False).mauve
                 for seed in range(seeds)]
    return float(np.mean(found)), float(np.std(found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings that the clustering library prints from C: it wants 39 texts per cluster, MAUVE gives ten."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with Path(os.devnull).open("w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
            yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
