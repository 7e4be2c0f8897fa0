"""Tokens per forward pass against quality: how much stable commits gain at nearly the same judge perplexity."""

from collections.abc import Sequence
from typing import Any

ALLOWED = 1.05
"""Highest allowed judge perplexity, relative to that of one token a step."""


def best_within(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the points whose `perplexity` is at most 5 % above that of the first point, which commits one token a step,
    the one with the most `tokens_per_pass`."""
    bound = ALLOWED * points[0]["perplexity"]
    return max((point for point in points if point is points[0] or point["perplexity"] <= bound),
               key=lambda point: point["tokens_per_pass"])
