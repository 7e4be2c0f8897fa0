"""Losses that stand out from those before them."""

import collections
import math
import statistics

WINDOW = 100
"""Losses that the next one is held against."""
FEWEST = 20
"""Fewer say nothing."""
DEVIATIONS = 6.0
"""A spike lies so many standard deviations above the mean."""
LEAST_SHARE = 0.01
"""A standard deviation counts as at least this share of the mean: a loss that hardly moves may move a little."""


class LossWatch:
    """Holds every loss of a run against the `WINDOW` before it; a resumed run begins with none."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def expected(self, loss: float) -> float | None:
        """The mean of the losses before, where a finite `loss` is a spike; it is remembered for the next ones."""
        before = list(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        if len(before) < FEWEST:
            return None
        mean = statistics.fmean(before)
        deviation = max(statistics.pstdev(before), LEAST_SHARE * abs(mean))
        return mean if loss > mean + DEVIATIONS * deviation else None
