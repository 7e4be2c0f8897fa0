"""Detects spikes of the loss."""

import collections
import math
import statistics

WINDOW = 100
"""Number of earlier losses that a loss is compared to."""
FEWEST = 20
"""Minimum number of earlier losses for a comparison."""
DEVIATIONS = 6.0
"""A spike lies more than this many standard deviations above the mean."""
LEAST_SHARE = 0.01
"""Lower bound of the standard deviation, as a share of the mean: small changes of a flat loss are not spikes."""


class LossWatch:
    """Compares each loss of a run to the `WINDOW` losses before it; a resumed run starts with an empty window."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def expected(self, loss: float) -> float | None:
        """The mean of the earlier losses if a finite `loss` is a spike, else None. Adds `loss` to the window."""
        before = list(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        if len(before) < FEWEST:
            return None
        mean = statistics.fmean(before)
        deviation = max(statistics.pstdev(before), LEAST_SHARE * abs(mean))
        return mean if loss > mean + DEVIATIONS * deviation else None
