"""Repetition against judge perplexity: the front of a method's settings, and the signed area between two fronts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokmat_jax.evaluation.metrics import bootstrap

SAMPLING, ALL_CURVES = "the baseline's sampling", "the baseline's sampling, penalty and repulsion"
"""Names of the fronts that areas are measured against."""
SHOWN = ("temperature", "nucleus", "penalty", "repulsion of the baseline", "repulsion", "guidance")
"""The curves of the first plot: the usual decoders, what pushes away from the past on both sides, and guidance."""


@dataclass(frozen=True)
class Point:
    """One setting of a method."""

    label: str
    repetition: float
    """Repetition in [0, 1]; lower is better."""
    perplexity: float
    """Perplexity under a judge, > 0; lower is better."""


@dataclass(frozen=True)
class Area:
    """How far one front lies below another; all fields are NaN if the fronts have no common range of repetition."""

    area: float
    """∫ (log perplexity of the baseline − ours) d repetition, in nats; positive if ours is ahead."""
    mean_gain: float
    """area / (high − low): mean lead of ours in nats per token at equal repetition."""
    low: float
    """The lowest repetition that both fronts reach."""
    high: float
    """The highest repetition that both fronts have a point at or above."""


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats, sorted by rising repetition; perplexity falls along them.

    A point beats another if neither of its numbers is higher and at least one is lower. Points with a number that is
    not finite are dropped, because nothing was measured there.
    """
    known = [p for p in points if math.isfinite(p.repetition) and math.isfinite(p.perplexity)]
    kept: list[Point] = []
    for point in sorted(known, key=lambda p: (p.repetition, p.perplexity)):
        twin = kept and (point.repetition, point.perplexity) == (kept[-1].repetition, kept[-1].perplexity)
        if not kept or twin or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return kept


def log_perplexity_at(front: Sequence[Point], repetition: float) -> float:
    """Log perplexity of a `front` at this `repetition`, interpolated between its settings, in nats.

    Linear in (repetition, log perplexity) between neighbouring points of the front, constant to the right of its
    last point, NaN to the left of its first point.
    """
    return float(_log_perplexity(front, np.array([repetition]))[0])


def signed_area(baseline: Sequence[Point], ours: Sequence[Point]) -> Area:
    """The area between the fronts of two sets of points, over the repetitions that both fronts span.

    Exact: the difference of two piecewise linear functions is integrated between the knots of both. A front with a
    single point spans no range.
    """
    fronts = front(baseline), front(ours)
    if not all(fronts):
        return Area(math.nan, math.nan, math.nan, math.nan)
    low = max(points[0].repetition for points in fronts)
    high = min(points[-1].repetition for points in fronts)
    if high <= low:
        return Area(math.nan, math.nan, math.nan, math.nan)
    knots = np.unique([low, high, *(p.repetition for points in fronts for p in points if low < p.repetition < high)])
    ahead = _log_perplexity(fronts[0], knots) - _log_perplexity(fronts[1], knots)
    area = float(np.trapezoid(ahead, knots))
    return Area(area, area / (high - low), low, high)


def interval_of_area(
    baseline: "Settings", ours: "Settings", resamples: int, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `signed_area` over resampled prompts; each resample computes both fronts again."""
    count = baseline.repetition.shape[1]
    return bootstrap(lambda chosen: signed_area(baseline.points(chosen), ours.points(chosen)).area, count, resamples,
                     seed)


@dataclass(frozen=True)
class Settings:
    """The settings of one or several methods, on the same N prompts."""

    labels: Sequence[str]
    repetition: np.ndarray
    """Repetition of each setting's sample for each prompt [M, N]; NaN if the sample does not count."""
    nats: np.ndarray
    """Total nats of each sample under the judge [M, N]."""
    judge_tokens: np.ndarray
    """Number of judge tokens of each sample [M, N]."""

    def points(self, chosen: np.ndarray | None = None) -> list[Point]:
        """A Point per setting, over all prompts or over the indices `chosen` [N]."""
        index = np.arange(self.repetition.shape[1]) if chosen is None else chosen
        drawn, tokens = self.repetition[:, index], self.judge_tokens[:, index].sum(1)
        known = ~np.isnan(drawn)
        with np.errstate(invalid="ignore", divide="ignore"):
            repetition = np.sum(drawn, axis=1, where=known) / known.sum(1)
            perplexity = np.exp(self.nats[:, index].sum(1) / tokens)
        return [Point(*one) for one in zip(self.labels, repetition.tolist(), perplexity.tolist(), strict=True)]

    def only(self, indices: Sequence[int]) -> "Settings":
        """Only the settings at `indices`."""
        chosen = list(indices)
        return Settings([self.labels[index] for index in chosen], self.repetition[chosen], self.nats[chosen],
                        self.judge_tokens[chosen])


def _log_perplexity(front: Sequence[Point], repetition: np.ndarray) -> np.ndarray:
    knots = [p.repetition for p in front]
    return np.interp(repetition, knots, np.log([p.perplexity for p in front]), left=math.nan)
