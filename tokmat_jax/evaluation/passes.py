"""Tokens per forward pass against quality: how far stable commits get at nearly the same judge perplexity."""

from collections.abc import Sequence
from typing import Any

ALLOWED = 1.05
"""Judge perplexity that may be paid, in that of one token a step."""


def best_within(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The point with the most `tokens_per_pass` whose `perplexity` is at most 5 % above that of the first one, which
    commits one token a step."""
    bound = ALLOWED * points[0]["perplexity"]
    return max((point for point in points if point is points[0] or point["perplexity"] <= bound),
               key=lambda point: point["tokens_per_pass"])
