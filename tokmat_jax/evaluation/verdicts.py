"""Five questions that a reader asks first, each answered from the report's data with a figure and its interval."""

import math
from dataclasses import dataclass
from typing import Any

from tokmat_jax.evaluation.frontier import ALL_CURVES, SAMPLING
from tokmat_jax.evaluation.numbers import number

AS_GOOD, FEW_LOOPS, PAYS = 0.005, 0.05, 1.15
"""Top-1 that a run may lack; share of samples that may loop; tokens a pass that pay for a wider pass."""


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    question: str
    answer: str
    """`yes`, `no`, `not sure` (the interval contains the bound), or `not measured`."""
    figure: str
    interval: str
    """95 %, over prompts."""


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """The five answers, from the contents of `report.json`."""
    return [_as_good(data["top1"]),
            _ahead("Is it ahead of sampling?", data, SAMPLING),
            _ahead("Is it ahead of the same backbone, decoded alike?", data, ALL_CURVES),
            _loops(data["rows"]), _pays(data["drafts"])]


def _answer(low: float | None, high: float | None, bound: float) -> str:
    """Whether a number is above `bound`, by its interval."""
    if low is None or high is None or not math.isfinite(low + high):
        return "not measured"
    return "yes" if low > bound else "no" if high < bound else "not sure"


def _between(low: float | None, high: float | None, percent: bool = False, signed: bool = False) -> str:
    ends = [number(end, percent, signed) for end in (low, high)]
    return "–" if "–" in ends else " to ".join(ends)


def _as_good(top1: dict[str, Any] | None) -> Verdict:
    question = "Is it as good a language model?"
    if top1 is None:
        return Verdict(question, "not measured", "the tokenizers differ", "–")
    lead, run, baseline = top1["lead"], top1["run"], top1["baseline"]
    return Verdict(question, _answer(lead["low"], lead["high"], -AS_GOOD),
                   f"top-1 {number(lead['value'], signed=True)} ({number(run)} against {number(baseline)})",
                   _between(lead["low"], lead["high"], signed=True))


def _ahead(question: str, data: dict[str, Any], against: str) -> Verdict:
    area = next(one for one in data["frontier"]["areas"]
                if one["against"] == against and one["curve"] == "all together")
    low, high = area["interval"]
    return Verdict(question, _answer(low, high, 0.0),
                   f"signed area {number(area['area'], signed=True)} nats × Rep-3, against {against}",
                   _between(low, high, signed=True))


def _loops(rows: list[dict[str, Any]]) -> Verdict:
    """Of the first row of maturation: the run's own setting, if its tail has room."""
    values = {row["name"]: row["values"]["periodic_loop"] for row in rows}
    ours = [row["name"] for row in rows if row["kind"] == "maturation"]
    if not ours:
        return Verdict("Is it free of loops?", "not measured", "–", "–")
    found = values[ours[0]]
    told = f"{number(found['value'], True)} of the samples of {ours[0]} end in a loop (greedy " \
           f"{number(values['greedy']['value'], True)}, human {number(values['human']['value'], True)})"
    answer = {"yes": "no", "no": "yes"}
    above = _answer(found["low"], found["high"], FEW_LOOPS)
    return Verdict("Is it free of loops?", answer.get(above, above), told,
                   _between(found["low"], found["high"], True))


def _pays(drafts: dict[str, Any]) -> Verdict:
    question = "Does the tail write several tokens a pass?"
    if not drafts:
        return Verdict(question, "not measured", "there is no room for a tail", "–")
    tail = drafts["tail"]
    others = ", ".join(f"{number(drafts[name]['value'])} {words}"
                       for name, words in (("lookup", "by looking back"), ("both", "by both")))
    return Verdict(question, _answer(tail["low"], tail["high"], PAYS),
                   f"{number(tail['value'])} tokens a pass by the tail alone; {others}",
                   _between(tail["low"], tail["high"]))
