"""The five answers that a report begins with, from made-up numbers."""

import copy
import math

import pytest

from tokmat_jax.evaluation.frontier import ALL_CURVES, SAMPLING
from tokmat_jax.evaluation.verdicts import verdicts


def value(middle, half=0.0):
    return {"value": middle, "low": middle - half, "high": middle + half}


def row(name, kind, loops):
    return {"name": name, "kind": kind, "values": {"periodic_loop": loops}}


DATA = {
    "top1": {"run": 0.29, "baseline": 0.3, "lead": value(-0.01, 0.004)},
    "frontier": {"areas": [
        {"curve": "all together", "against": SAMPLING, "area": 0.1, "interval": (0.05, 0.15)},
        {"curve": "repulsion", "against": SAMPLING, "area": -9.0, "interval": (-9.0, -9.0)},
        {"curve": "all together", "against": ALL_CURVES, "area": 0.02, "interval": (-0.01, 0.05)}]},
    "rows": [row("human", "human", value(0.0)), row("greedy", "sampling", value(0.9)),
             row("maturation, the run's setting", "maturation", value(0.3, 0.1)),
             row("plain, repulsion 0.4", "maturation", value(0.0))],
    "drafts": {"tail": value(1.3, 0.1), "lookup": value(1.2), "both": value(1.5)},
}


def answers(data):
    return [one.answer for one in verdicts(data)]


def test_each_question_has_its_answer_figure_and_interval():
    found = verdicts(DATA)
    assert [one.answer for one in found] == ["no", "yes", "not sure", "no", "yes"]
    assert [one.interval for one in found] == [
        "−0.014 to −0.006", "+0.050 to +0.150", "−0.010 to +0.050", "20 % to 40 %", "1.200 to 1.400"]
    assert "−0.010 (0.290 against 0.300)" in found[0].figure
    assert found[3].figure == ("30 % of the samples of maturation, the run's setting end in a loop (greedy 90 %, "
                               "human 0 %)")
    assert found[4].figure == "1.300 tokens a pass by the tail alone; 1.200 by looking back, 1.500 by both"


@pytest.mark.parametrize(("part", "changed", "number", "answer"), [
    ("top1", {"lead": value(-0.004, 0.0005)}, 0, "yes"),
    ("top1", {"lead": value(-0.004, 0.002)}, 0, "not sure"),
    ("drafts", {"tail": value(1.1, 0.04)}, 4, "no"),
    ("drafts", {"tail": value(1.1, 0.06)}, 4, "not sure"),
])
def test_an_answer_is_sure_only_if_its_interval_is_on_one_side(part, changed, number, answer):
    assert answers(DATA | {part: DATA[part] | changed})[number] == answer


def test_loops_are_few_if_the_whole_interval_says_so():
    data = copy.deepcopy(DATA)
    data["rows"][2]["values"]["periodic_loop"] = value(0.02, 0.02)
    assert answers(data)[3] == "yes"
    data["rows"][2]["values"]["periodic_loop"] = value(0.04, 0.04)
    assert answers(data)[3] == "not sure"


def test_what_was_not_measured_is_said():
    nothing = {"curve": "all together", "area": math.nan, "interval": (math.nan, math.nan)}
    data = {"top1": None, "rows": DATA["rows"][:2], "drafts": {},
            "frontier": {"areas": [nothing | {"against": SAMPLING}, nothing | {"against": ALL_CURVES}]}}
    assert answers(data) == ["not measured"] * 5
    assert all(one.interval == "–" for one in verdicts(data))
