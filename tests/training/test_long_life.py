"""A process that answers and trains for long neither compiles again nor grows. No stopwatch."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reliability

pytestmark = pytest.mark.slow


def test_requests_of_mixed_shape_compile_nothing_and_leave_nothing_behind():
    flags = reliability.Args(requests=200)
    found = reliability.generation(flags)
    assert found["later_compilations"] == 0
    # Were the state of every request kept, the last nine tenths of them would leave this much.
    assert found["memory"]["growth"] < 0.5 * 0.9 * flags.requests * found["kept_state"]


def test_many_training_steps_take_no_more_memory_than_few():
    flags = reliability.Args(steps=2000)
    found = reliability.training(flags)
    assert found["steps"] == 2000
    # In the second half everything has happened before. Were the table and its two moments kept at every step, 257 rows
    # of 16 numbers each, that half would leave this much.
    grown = found["memory"]["end"] - found["memory"]["half"]
    assert grown < 0.5 * 0.5 * flags.steps * 3 * 257 * 16 * 4
    assert set(found["step_seconds"]) == {"second_tenth", "last_tenth"}


def test_the_card_ends_with_a_line_of_json(capsys, monkeypatch):
    half = {"memory": reliability.course([1.0] * 20)}
    monkeypatch.setattr(reliability, "generation", lambda flags: half | {
        "warm_compilations": 60, "later_compilations": 0, "tokens": 5, "kept_state": 1.0})
    monkeypatch.setattr(reliability, "training", lambda flags: half | {
        "steps": 10, "step_seconds": {"second_tenth": 1.0, "last_tenth": 1.1}, "slowdown": 1.1})
    reliability.main(["--requests", "10"])
    *card, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["settings"]["requests"] == 10
    assert "0 later (aim 0)" in "\n".join(card)
    assert json.loads(last)["training"]["slowdown"] == 1.1
