"""The scripts in processes of their own, and what they leave in a workdir."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[1]


def script(*args, cwd=ROOT):
    """Runs a script on one device."""
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=4", "count=1")}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True,
                          check=False, timeout=600)


def rows(path):
    """The objects in a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(workdir, item="params"):
    """(step, arrays) of the newest checkpoint."""
    folder = workdir.resolve() / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without shardings Orbax takes those of the file, and says so
        return step, ocp.PyTreeCheckpointer().restore(folder / str(step) / item)
