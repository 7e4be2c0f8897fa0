"""The verdict on a row of the log, and the table of all rows, from rows written by hand."""

import copy
import math

import pytest

from tokmat_jax.evaluation import summary


def value(number):
    return {"value": number, "low": number, "high": number}


def scores(**columns):
    return {name: value(number) for name, number in columns.items()}


ROW = {
    "experiment": "one", "seed": 0, "top1": {"run": 0.3, "baseline": 0.29},
    "rows": {
        "human": scores(rep_3=0.05, periodic_loop=0.0, judge_perplexity=40.0),
        "greedy": scores(rep_3=0.8, periodic_loop=0.6, judge_perplexity=4.0),
        "nucleus 0.95": scores(rep_3=0.01, periodic_loop=0.0, judge_perplexity=30.0),
        "maturation, plain (K 8)": scores(rep_3=0.7, periodic_loop=0.5, judge_perplexity=5.0),
        "plain, repulsion 0.4": scores(rep_3=0.04, periodic_loop=0.01, judge_perplexity=9.0),
    },
    "frontier": {"areas": [
        {"curve": "all together", "against": "the baseline's sampling", "area": 0.2, "interval": [0.1, 0.3]},
        {"curve": "all together", "against": "the baseline's sampling, penalty and repulsion", "area": -0.1,
         "interval": [-0.2, 0.1]},
    ]},
    "lookahead": {"1": {"share": 0.5, "chance": 0.3}, "2": {"share": 0.6, "chance": 0.2}},
}


def changed(**changes):
    row = copy.deepcopy(ROW)
    for path, number in changes.items():
        at = row
        *before, last = path.split("__")
        for key in before:
            at = at[int(key) if isinstance(at, list) else key]
        at[last] = number
    return row


def reached(row):
    return [sentence.rsplit(": ", 1)[1] == "reached" for sentence in summary.verdict(row)]


def test_each_target_has_its_numbers_and_its_verdict():
    said = summary.verdict(ROW)
    assert said[0] == "top-1 0.300, the baseline's 0.290: reached"
    assert said[1] == ("maturation, plain (K 8): periodic loops 50 % (greedy 60 %), judge perplexity 5.00 (nucleus .95 "
                       "30.0): not reached")
    assert said[2].startswith("plain, repulsion 0.4: periodic loops 1 %")
    assert said[3] == "signed area against the baseline's sampling +0.200 (+0.100 to +0.300): reached"
    assert said[5] == ("tail tokens committed within the next 32: 60 % with guidance 2, 50 % without, 20 % by chance: "
                       "reached")
    assert reached(ROW) == [True, False, True, True, False, True]


@pytest.mark.parametrize(("changes", "index", "expected"), [
    ({"top1__run": 0.29}, 0, True), ({"top1__run": 0.289}, 0, False),
    ({"rows__plain, repulsion 0.4__judge_perplexity": value(31.0)}, 2, False),
    ({"rows__plain, repulsion 0.4__periodic_loop": value(0.05)}, 2, False),
    ({"frontier__areas__0__interval": [0.0, 0.3]}, 3, False),
    ({"frontier__areas__0__interval": [None, None]}, 3, False),
    ({"lookahead__2__share": 0.5}, 5, False), ({"lookahead__2__chance": 0.7}, 5, False),
    ({"lookahead__2__share": None}, 5, False),
])
def test_a_target_is_reached_only_by_its_own_rule(changes, index, expected):
    row = ROW
    for path, number in changes.items():
        row = changed(**{path: number})
    assert reached(row)[index] == expected


def test_the_table_has_means_and_ranges_over_seeds():
    other = changed(seed=1, top1__run=0.32, frontier__areas__0__area=0.4) | {"seed": 1}
    single = changed() | {"experiment": "two"}
    lines = summary.table([ROW, single, other]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| one | 0, 1 | 0.310 [0.300, 0.320] (0.290 [0.290, 0.290]) | 50 % [50 %, 50 %]")
    assert "+0.300 [+0.200, +0.400]" in lines[2]
    assert lines[3].startswith("| two | 0 | 0.300 (0.290) | 50 % (60 %) | 5.00 (30.0) | 1 % | 0.040 (0.050) | 9.00 |")
    assert {line.count("|") for line in lines} == {12}


def test_what_was_not_measured_is_a_dash():
    row = changed(**{"rows__maturation, plain (K 8)__periodic_loop": {"value": None, "low": None, "high": None}})
    assert math.isnan(summary.score(row, "maturation, plain (K 8)", "periodic_loop"))
    assert "| – (60 %) |" in summary.table([row])
