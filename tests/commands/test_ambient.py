"""Settings of JAX that an environment brings along."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from scripts import rows
from tokmat_jax.commands import data
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.keys import seed_key

ROOT = Path(__file__).resolve().parents[2]
AMBIENT = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0",
           "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_RANDOM_SEED_OFFSET": "7",
           "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1", "JAX_DEBUG_NANS": "1", "JAX_LEGACY_PRNG_KEY": "error",
           "JAX_EXPLICIT_X64_DTYPES": "error", "JAX_TRANSFER_GUARD": "disallow",
           "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "disallow"}
IGNORED = {"JAX_ENABLE_X64", "JAX_THREEFRY_PARTITIONABLE", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_RANDOM_SEED_OFFSET",
           "JAX_HIGH_DYNAMIC_RANGE_GUMBEL", "JAX_TRANSFER_GUARD", "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE"}


def script(*args, **environment):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=os.environ | environment, timeout=600,
                          capture_output=True, text=True, check=False)


def notes(said):
    return {line.removeprefix("note: ").split("=")[0] for line in said.stderr.splitlines() if line.startswith("note: ")}


def test_what_the_environment_tells_jax_changes_no_number(runs_dir, tmp_path):
    said = script("train.py", *runs.arguments(runs_dir, "ambient"), **AMBIENT)
    assert said.returncode == 0, said.stderr
    assert notes(said) >= IGNORED
    losses = [[row["train/loss"] for row in rows(runs_dir / name / "metrics.jsonl") if "train/loss" in row]
              for name in ("run", "ambient")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    prompts = ["the cat", "a", "who sat by the sea"]
    expected = [sample.text for sample in Generator.from_workdir(runs_dir / "run").generate(prompts)]
    said = script("generate.py", "--workdir", runs_dir / "run", "--batch-size", 1, "--output", tmp_path / "alone",
                  *(word for prompt in prompts for word in ("--prompt", prompt)), **AMBIENT)
    assert [row["text"] for row in rows(tmp_path / "alone")] == expected, said.stderr


def test_a_library_that_would_compute_other_numbers_says_so(runs_dir):
    plain = jax.random.normal(seed_key(3), (4,))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.normal(seed_key(3), (4,)), plain)
    with jax.enable_x64(True), pytest.raises(UserError, match="jax_enable_x64 is True, which changes every number"):
        Generator.from_workdir(runs_dir / "run")


def test_a_platform_that_is_not_there_is_one_line(runs_dir):
    said = script("generate.py", "--workdir", runs_dir / "run", "--prompt", "a", JAX_PLATFORMS="tpu")
    assert said.returncode == 2
    assert said.stderr.startswith("error: JAX finds no such device: Unable to initialize backend 'tpu'")
    assert said.stderr.count("\n") == 1


def test_without_linuxs_count_of_cpus_there_is_one_worker_per_cpu(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert importlib.reload(data).Prepare().workers == os.cpu_count()
