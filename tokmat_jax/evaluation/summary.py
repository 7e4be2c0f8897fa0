"""Summarises the log of experiments: one experiment against the four targets of a recipe, and a table of all."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokmat_jax.evaluation.frontier import ALL_CURVES, SAMPLING
from tokmat_jax.evaluation.numbers import area_interval, number

Row = dict[str, Any]
"""A row of the log."""


def plain_name(row: Row) -> str:
    """The row's name for plain maturation."""
    return next(name for name in row["rows"] if name.startswith("maturation, plain"))


def score(row: Row, method: str, column: str) -> float:
    """A number of the short report card; NaN if it was not measured."""
    value = row["rows"][method][column]["value"]
    return float("nan") if value is None else value


def area(row: Row, against: str = SAMPLING, curve: str = "all together") -> Row:
    """The signed area of a `curve` `against` a front."""
    return next(one for one in row["frontier"]["areas"] if one["against"] == against and one["curve"] == curve)


def verdict(row: Row) -> list[str]:
    """The targets of a recipe: for each, its numbers and whether they reach it."""
    plain, repelled = plain_name(row), "plain, repulsion 0.4"
    top1, nucleus = row["top1"], score(row, "nucleus 0.95", "judge_perplexity")
    said = [f"top-1 {number(top1['run'])}, the baseline's {number(top1['baseline'])}: "
            f"{_told(top1['run'] >= top1['baseline'])}"]
    for name in (plain, repelled):
        loops, perplexity = score(row, name, "periodic_loop"), score(row, name, "judge_perplexity")
        greedy = number(score(row, "greedy", "periodic_loop"), True)
        said.append(
            f"{name}: periodic loops {number(loops, True)} (greedy {greedy}), judge perplexity {number(perplexity)} "
            f"(nucleus .95 {number(nucleus)}): {_told(loops < 0.05 and perplexity <= nucleus)}")
    for against in (SAMPLING, ALL_CURVES):
        one = area(row, against)
        low = one["interval"][0]
        said.append(f"signed area against {against} {number(one['area'], signed=True)} ({area_interval(one)}): "
                    f"{_told(low is not None and low > 0)}")
    free, guided = row["lookahead"]["1"], row["lookahead"]["2"]
    shares = [float("nan") if one is None else one for one in (guided["share"], guided["chance"], free["share"])]
    return [*said, f"tail tokens committed within the next 32: {number(shares[0], True)} with guidance 2, "
            f"{number(shares[2], True)} without, {number(shares[1], True)} by chance: "
            f"{_told(all(shares[0] > share for share in shares[1:]))}"]


def _told(reached: bool) -> str:
    return "reached" if reached else "not reached"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one line per experiment: means over its seeds, with their range [lowest, highest] if there are
    several. If there is one seed, an area has its interval over prompts in round brackets."""
    header = ("experiment", "seeds", "top-1 (baseline)", "plain: loops (greedy)", "plain: judge ppl (nucleus .95)",
              "repulsion .4: loops", "Rep-3 (human)", "judge ppl", "area against sampling",
              "against penalty and repulsion too", "lookahead s = 2 / 1 (chance)")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name in dict.fromkeys(row["experiment"] for row in rows):
        same = [row for row in rows if row["experiment"] == name]
        lines.append(f"| {name} | {', '.join(str(row['seed']) for row in same)} | {' | '.join(_cells(same))} |")
    return "\n".join(lines) + "\n"


def _cells(rows: Sequence[Row]) -> list[str]:
    def of(get: Callable[[Row], float | None], percent: bool = False, signed: bool = False) -> str:
        values = [np.nan if (value := get(row)) is None else value for row in rows]
        shown = number(float(np.mean(values)), percent, signed)
        if len(values) == 1 or "–" in shown:
            return shown
        return f"{shown} [{number(min(values), percent, signed)}, {number(max(values), percent, signed)}]"

    def scored(method: str, column: str, percent: bool = False) -> str:
        return of(lambda row: score(row, plain_name(row) if method == "plain" else method, column), percent)

    def area_of(against: str) -> str:
        if len(rows) > 1:
            return of(lambda row: area(row, against)["area"], signed=True)
        return f"{of(lambda row: area(row, against)['area'], signed=True)} ({area_interval(area(rows[0], against))})"

    def foreseen(scale: str, what: str) -> str:
        return of(lambda row: row["lookahead"][scale][what], True)

    repelled = "plain, repulsion 0.4"
    return [
        f"{of(lambda row: row['top1']['run'])} ({of(lambda row: row['top1']['baseline'])})",
        f"{scored('plain', 'periodic_loop', True)} ({scored('greedy', 'periodic_loop', True)})",
        f"{scored('plain', 'judge_perplexity')} ({scored('nucleus 0.95', 'judge_perplexity')})",
        scored(repelled, "periodic_loop", True),
        f"{scored(repelled, 'rep_3')} ({scored('human', 'rep_3')})",
        scored(repelled, "judge_perplexity"),
        area_of(SAMPLING), area_of(ALL_CURVES),
        f"{foreseen('2', 'share')} / {foreseen('1', 'share')} ({foreseen('2', 'chance')})",
    ]
