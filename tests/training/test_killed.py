"""Training runs that are killed, as `benchmarks/killed.py` does it."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def killed(monkeypatch):
    """The benchmark, imported from its own folder as when it runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("killed")


@pytest.mark.slow
def test_killed_runs_end_as_if_they_never_were(killed, capsys):
    killed.main(["--times", "2", "--steps", "80", "--seed", "1"])
    *card, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["bit_equal"] == 2
    assert found["kills"] >= 2
    assert found["while_saving"] >= 1
    assert len(card) == 3


def test_one_bit_of_difference_is_named(killed):
    one = {"params": {"table": np.float32([1.0, 0.0])}, "data": {"position": 3}}
    assert killed.differing(one, one) == []
    assert killed.differing(one, {**one, "params": {"table": np.float32([1.0, -0.0])}}) == ["['params']['table']"]
    assert killed.differing(one, {**one, "data": {"position": 4}}) == ["['data']['position']"]
    assert killed.differing(one, {"params": one["params"]}) == ["the names"]
