"""Runs contestants in separate processes that take turns on one machine, so that disturbances affect all of them.

A contestant is a script that is called with its name and settings. It prints one line of JSON when it is ready. For
every line on standard input it does a round of work and prints a line {"seconds": …, "peak_bytes": …}.
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
    """The contestant's side: runs `work` once to warm up, then once per line of input."""
    work()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        work()
        print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes, compilation included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass
class Contestant:
    """The benchmark's side of a contestant process."""

    name: str
    process: subprocess.Popen[str]

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON; other output of libraries is skipped."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise UserError(f"the contestant {self.name!r} has stopped with exit code {self.process.wait()}: see above")

    def work(self) -> dict[str, Any]:
        """Lets it work one round; returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def alternate(script: str, names: Sequence[str], settings: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Lets the contestants take turns; returns the seconds of every round and the peak memory of each.

    The order within a round also alternates, so that no contestant always follows the same one.
    """
    started = []
    try:
        for name in names:
            # Start one after the other, so that compilations do not compete for the machine.
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
            with one.process:  # closes its pipes and waits for it
                one.process.kill()


def take_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """As `alternate`, for contestants that may share this process; each of `works` must return only when it is done.

    Each is called once before the timing starts, so that no timing includes a compilation.
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
    """Median seconds per round of `name`."""
    return statistics.median(found[name]["seconds"])


def words_of(flags: Any) -> list[str]:
    """The command line for a contestant, from a dataclass of numbers and texts; boolean flags are not passed on."""
    return [word for name, value in asdict(flags).items() if value is not None and not isinstance(value, bool)
            for word in (f"--{name.replace('_', '-')}", str(value))]


def ratio(found: dict[str, dict[str, Any]], fast: str, slow: str) -> dict[str, float]:
    """Speed of `fast` divided by that of `slow`: the median over rounds, and the quartiles."""
    return quartiles(np.array(found[slow]["seconds"]) / np.array(found[fast]["seconds"]))


def quartiles(each: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The median and the quartiles of the ratios `each`."""
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def machine() -> dict[str, Any]:
    """Facts about the machine and the versions, on which the figures of a card depend."""
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
    """Prints one line of a card."""
    verdict = "reached" if found["median"] >= aim else "not reached"
    print(f"  {label:52}{found['median']:7.2f} ×  ({found['low']:.2f}–{found['high']:.2f})   aim {aim:g} ×: {verdict}")
