"""Numbers as a reader sees them: few digits, a dash if there is none."""

import math
from typing import Any


def number(value: float | None, percent: bool = False, signed: bool = False) -> str:
    """Three significant digits; a dash if there is no value."""
    if value is None or not math.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if percent:
        return f"{100 * value:{sign}.0f} %".replace("-", "−")
    places = next((places for least, places in ((1000, 0), (10, 1), (2, 2)) if abs(value) >= least), 3)
    return f"{value:{sign},.{places}f}".replace("-", "−")


def interval(value: dict[str, Any], percent: bool = False) -> str:
    """`0.412 (0.380–0.440)`."""
    shown = number(value["value"], percent)
    low, high = number(value["low"], percent), number(value["high"], percent)
    between = " to " if "−" in low else "–"
    return shown if "–" in (shown, low, high) else f"{shown} ({low}{between}{high})"


def area_interval(area: dict[str, Any]) -> str:
    """`+0.106 to +0.177`; a dash if there is no area."""
    low, high = (number(end, signed=True) for end in area["interval"])
    return f"{low} to {high}" if number(area["area"]) != "–" else "–"
