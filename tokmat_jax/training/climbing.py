"""A loss that climbs away from where it began, as one does that starts from a good model with too high a rate."""

import collections
import math
import statistics

WINDOW = 20
"""Losses at the start, and at the end, whose medians are compared."""
SHARE = 1.25
"""A loss has climbed if the last median is more than this many times the first …"""
LEAST = 0.1
"""… and lies at least this far above it, so that a loss near 0 may waver."""


class ClimbWatch:
    """Compares the last losses with the first ones that this process has seen; speaks once."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._spoken = False

    def climbed(self, loss: float) -> tuple[float, float] | None:
        """The first and the last median, the first time that the last one is clearly higher; a loss that is not finite
        is left out."""
        if self._spoken or not math.isfinite(loss):
            return None
        if len(self._first) < WINDOW:
            self._first.append(loss)
            return None
        self._last.append(loss)
        if len(self._last) < WINDOW:
            return None
        first, last = statistics.median(self._first), statistics.median(self._last)
        self._spoken = last > SHARE * first and last > first + LEAST
        return (first, last) if self._spoken else None
