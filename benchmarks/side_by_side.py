"""Contestants in processes of their own, which take turns on one machine: what disturbs one round disturbs all of them.

A contestant is a script that is called with its name and its settings, prints one line of JSON when it is ready, and
answers every line on its standard input by a round of work and a line {"seconds": …, "peak_bytes": …}.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.errors import UserError


def serve(work: Callable[[], Any]) -> None:
    """The contestant's side: `work` once to warm up, and then once per line of input."""
    work()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        work()
        print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had (its resident set), compilation included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass
class Contestant:
    """The benchmark's side of a process."""

    name: str
    process: subprocess.Popen[str]

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON; what a library says besides is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise UserError(f"the contestant {self.name!r} has stopped with exit code {self.process.wait()}: see above")

    def work(self) -> dict[str, Any]:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def alternate(script: str, names: Sequence[str], settings: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round of each contestant, which take turns, and its peak memory.

    The order within a round alternates too, so that none always follows the same one.
    """
    started = []
    try:
        for name in names:
            # One after the other, so that compilations do not share the machine.
            process = subprocess.Popen([sys.executable, script, "--contestant", name, *settings], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            started.append(Contestant(name, process))
            started[-1].answer()
        found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": 0} for name in names}
        for number in range(rounds):
            for one in started if number % 2 == 0 else started[::-1]:
                answer = one.work()
                found[one.name]["seconds"].append(answer["seconds"])
                found[one.name]["peak_bytes"] = answer["peak_bytes"]
        return found
    finally:
        for one in started:
            with one.process:  # which closes its pipes and waits for it
                one.process.kill()


def take_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """As `alternate` for contestants that may share this process; `works` return when they are done.

    Each is called once before anything is timed, so that no timing includes a compilation.
    """
    for work in works.values():
        work()
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in works}
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else list(works)[::-1]:
            begin = time.perf_counter()
            works[name]()
            found[name]["seconds"].append(time.perf_counter() - begin)
    return found


def median(found: dict[str, dict[str, Any]], name: str) -> float:
    """Seconds of a round of `name`."""
    return statistics.median(found[name]["seconds"])


def words_of(flags: Any) -> list[str]:
    """The command line of a dataclass of numbers and texts, for a contestant; switches are its parent's alone."""
    return [word for name, value in asdict(flags).items() if value is not None and not isinstance(value, bool)
            for word in (f"--{name.replace('_', '-')}", str(value))]


def ratio(found: dict[str, dict[str, Any]], fast: str, slow: str) -> dict[str, float]:
    """How many times as fast `fast` is as `slow`: the median over rounds, and the middle half."""
    return quartiles(np.array(found[slow]["seconds"]) / np.array(found[fast]["seconds"]))


def quartiles(each: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The median of some ratios, and the middle half."""
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def machine() -> dict[str, Any]:
    """What the figures of a card depend on."""
    import os

    import jax

    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"cpu": name, "cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "python": platform.python_version()}


def print_ratio(label: str, found: dict[str, float], aim: float) -> None:
    """One line of a card."""
    verdict = "reached" if found["median"] >= aim else "not reached"
    print(f"  {label:52}{found['median']:7.2f} ×  ({found['low']:.2f}–{found['high']:.2f})   aim {aim:g} ×: {verdict}")
