"""Checks that a training run loses nothing if its machine dies.

    python benchmarks/killed.py --times 20

First, `train.py` runs once without interruption. Then the same run is repeated: its first and second process are killed
(SIGKILL), and the third one runs to the end. The kills happen in turn during the start, at a random step, and while a
checkpoint is being written. Each process must continue from the newest complete checkpoint, no half-written checkpoint
may be listed or left over, and the final parameters, optimiser state and data position must equal those of the
undisturbed run, bit by bit.
A line of JSON follows the card; the exit code is 2 if anything was lost.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from side_by_side import machine

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("starting", "running", "saving")
PATIENCE = 120.0
"""Seconds after which a process that neither ends nor saves counts as stuck."""


@dataclass(frozen=True)
class Args:
    """Kill training runs and check that nothing is lost."""

    times: int = 20
    """Number of runs; each is killed twice."""
    steps: int = 200
    """Training steps per run."""
    checkpoint_every: int = 4
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the moments at which processes are killed."""


def flags(folder: Path, name: str, args: Args) -> list[str]:
    """The command of the run `name`: script and flags."""
    given = {"workdir": folder / name, "data.source": f"files:{folder}/text.txt", "data.prepared-dir": folder,
             "data.seq-len": 32, "tokenizer.kind": "bytes", "model.embed-dim": 32, "model.num-layers": 2,
             "model.num-heads": 2, "objective.num-negatives": 16, "train.batch-size": 4, "train.num-steps": args.steps,
             "train.log-every": 20, "train.eval-every": 150, "train.eval-batches": 2, "train.num-samples": 0,
             "train.checkpoint-every": args.checkpoint_every, "generation.tail-length": 4, "mesh.data": 1,
             "compute.compilation-cache": folder / "compiled"}
    return [str(ROOT / "train.py"), *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def write_text(path: Path) -> None:
    """Writes random documents, all different."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(500)]
    path.write_text("<|endoftext|>".join(" ".join(rng.choice(words, 100)) for _ in range(200)))


def steps_of(workdir: Path) -> list[int]:
    """Steps of the listed checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def newest(workdir: Path) -> int:
    """Step of the newest listed checkpoint, 0 if there is none."""
    return (steps_of(workdir) or [0])[-1]


def half_written(workdir: Path) -> list[Path]:
    """Checkpoints that are being written, or that were when the process died."""
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def last_state(workdir: Path) -> dict[str, Any]:
    """The newest checkpoint as arrays, read by Orbax alone, without code of this library."""
    step = workdir.resolve() / "checkpoints" / str(steps_of(workdir)[-1])
    reader = ocp.PyTreeCheckpointer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that it takes the shardings from the file
        arrays = {item: jax.device_get(reader.restore(step / item)) for item in ("params", "optimizer")}
    return arrays | {"data": json.loads((step / "data" / "metadata").read_text())}


def start(folder: Path, name: str, args: Args) -> subprocess.Popen[str]:
    """Starts a process of the run `name`; its output goes to a file next to its workdir."""
    one_device = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    with (folder / f"{name}.txt").open("w") as said:
        return subprocess.Popen([sys.executable, *flags(folder, name, args)], cwd=ROOT, stdout=said, stderr=said,
                                text=True, env=one_device)


def wait_for(process: subprocess.Popen[str], workdir: Path, step: int, saving: bool) -> None:
    """Waits until the checkpoint of `step` is listed and, if `saving`, one is being written, or the process ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not (newest(workdir) >= step and (half_written(workdir) or not saving)):
        if time.monotonic() > deadline:
            process.kill()
            raise UserError(f"{workdir}: stuck, step {step} was not saved in {PATIENCE:.0f} s")


def kill(folder: Path, name: str, args: Args, kind: str, begin: float, rng: np.random.Generator) -> dict[str, Any]:
    """Starts the run and kills it; returns the checkpoints at that time and the step from which the process resumed.

    `begin` is the approximate time in seconds from the start of a process to its first checkpoint.
    """
    workdir = folder / name
    known = newest(workdir)
    process = start(folder, name, args)
    if kind == "starting":
        time.sleep(rng.uniform(0.0, begin))
    else:
        room = args.steps - 4 * args.checkpoint_every - known
        wait_for(process, workdir, known + int(rng.integers(0, max(1, room // 2))), kind == "saving")
        time.sleep(rng.uniform(0.0, 0.03))
    process.kill()
    process.wait()
    said = re.search(r"resuming after step ([\d,]+)", (folder / f"{name}.txt").read_text())
    gone_on = int(said[1].replace(",", "")) if said else None
    return {"killed": process.returncode < 0, "saving": bool(half_written(workdir)), "steps": steps_of(workdir),
            "went_on": gone_on in ((None, known) if known else (None,))}


def finish(folder: Path, name: str, args: Args) -> float:
    """Runs to the end; returns the seconds until the first checkpoint."""
    begin = time.monotonic()
    process = start(folder, name, args)
    wait_for(process, folder / name, args.checkpoint_every, False)
    seconds = time.monotonic() - begin
    if process.wait():
        raise UserError(f"{folder / name} ended with {process.returncode}: "
                        f"{(folder / f'{name}.txt').read_text().splitlines()[-1]}")
    return seconds


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the leaves that differ in any bit."""
    one, two = (jax.tree_util.tree_leaves_with_path(tree) for tree in (expected, found))
    if [path for path, _ in one] != [path for path, _ in two]:
        return ["the names"]
    return [jax.tree_util.keystr(path) for (path, a), (_, b) in zip(one, two, strict=True)
            if np.asarray(a).tobytes() != np.asarray(b).tobytes()]


def main(words: Sequence[str]) -> None:
    """Prints the card."""
    args = parse(Args, words)
    rng, lost = np.random.default_rng(args.seed), []
    count = dict.fromkeys(("kills", "while_saving", "bit_equal"), 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        finish(folder, "compiled-once", args)
        seconds = finish(folder, "whole", args)
        expected = last_state(folder / "whole")
        print(f"undisturbed: {args.steps} steps, {args.steps // args.checkpoint_every} checkpoints, the first after "
              f"{seconds:.1f} s")
        for number in range(1, args.times + 1):
            run = f"run-{number}"
            kinds = (KINDS[number % 3], KINDS[(number + number // 3) % 3])
            kills = [kill(folder, run, args, kind, seconds, rng) for kind in kinds]
            finish(folder, run, args)
            wrong = differing(expected, last_state(folder / run))
            wrong += [f"half-written {path.name}" for path in half_written(folder / run)]
            wrong += [f"process {index} did not resume from the newest" for index, one in enumerate(kills, 1)
                      if not one["went_on"]]
            print(f"run {number:2}: killed at step " + " and ".join(
                f"{(one['steps'] or [0])[-1]:3} while {'saving' if one['saving'] else kind}"
                for one, kind in zip(kills, kinds, strict=True))
                + (f": {', '.join(wrong)}" if wrong else ": bit-equal"), flush=True)
            count["kills"] += sum(one["killed"] for one in kills)
            count["while_saving"] += sum(one["saving"] for one in kills)
            count["bit_equal"] += not wrong
            lost += [run] * bool(wrong)
    print(json.dumps({"benchmark": "killed", **count, "settings": asdict(args),
                      "machine": machine()}))
    if lost:
        raise UserError(f"{len(lost)} of {args.times} runs did not end as the undisturbed one: {', '.join(lost)}")


if __name__ == "__main__":
    run_script(main)
