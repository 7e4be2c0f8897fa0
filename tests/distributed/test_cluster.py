"""Several processes on one machine: what a run on a cluster does, with two of them and two devices each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def command(folder, name, devices, *more):
    """A command and its environment: a run of `name` in one process of `devices` fake devices."""
    flags = runs.arguments(folder, name, "--train.batch-size", "8", "--train.num-steps", str(STEPS),
                           "--train.log-every", "1", "--train.eval-every", "4", "--train.checkpoint-every",
                           "2", "--mesh.data", "-1",
                           "--mesh.fsdp", "2", "--optimizer.schedule", "constant", *more)
    pretended = os.environ["XLA_FLAGS"].replace("count=4", f"count={devices}")
    env = os.environ | {"XLA_FLAGS": pretended, "PYTHONPATH": str(ROOT)}
    return [sys.executable, str(ROOT / "train.py"), *flags], env


def start_two(folder, name, *more):
    """The two processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        words, env = command(folder, name, 2, "--cluster.kind", "manual", "--cluster.coordinator", f"localhost:{port}",
                             "--cluster.num-processes", "2", "--cluster.process-index", str(index), *more)
        started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        cwd=folder))
    return started


def finish(processes):
    """Output and errors of all, which must have ended well."""
    said = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    return said


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in ("train/loss", "validation/loss") if name in row}


def steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


@pytest.mark.slow
def test_a_run_of_two_processes_survives_one_of_them_and_moves_to_one_process_with_eight_devices(tmp_path):
    runs.write_corpus(tmp_path)
    words, env = command(tmp_path, "whole", 1, "--mesh.fsdp", "1")
    subprocess.run(words, env=env, cwd=tmp_path, check=True, capture_output=True, timeout=240)

    processes = start_two(tmp_path, "cut", "--train.num-steps", "6")
    deadline = time.monotonic() + 240
    while not steps(tmp_path / "cut") and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [one.communicate()[1] for one in processes]
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    # The first one cannot go on alone (unless it was done by then). Where it waits for the other one in a barrier and
    # not in a sum, JAX ends it by itself when the heartbeats have been missing for a minute and a half.
    _, errors = processes[0].communicate(timeout=240)
    assert "Traceback" not in errors
    said = {0: "", 3: "run the same command again in all processes", -signal.SIGABRT: "another task died"}
    assert said[processes[0].returncode] in errors
    processes[1].communicate(timeout=240)

    said = finish(start_two(tmp_path, "cut", "--train.num-steps", "6"))
    assert "6 steps of 8" in said[0][0]
    assert "6 steps" not in said[1][0]  # the first process speaks for both
    assert 6 in steps(tmp_path / "cut")

    words, env = command(tmp_path, "cut", 8)
    moved = subprocess.run(words, env=env, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=240)
    assert "resuming after step 6" in moved.stdout
    assert "'data': 4, 'fsdp': 2" in moved.stdout
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert set(cut) - set(whole) == {(6, "validation/loss")}  # the last step that the two were asked for
    assert len(whole) == STEPS + 2
    # Sums of a few thousand float32 terms in another order, then eight updates by AdamW.
    for key, value in whole.items():
        assert cut[key] == pytest.approx(value, rel=1e-4), key


def test_a_mistake_stops_all_processes_with_one_line_each(tmp_path):
    runs.write_corpus(tmp_path)
    processes = start_two(tmp_path, "wrong", "--data.source", "files:nowhere.txt")
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "no file matches 'nowhere.txt'" in said[0][1]
    assert "process 0 has" in said[1][1]
    for _, errors in said:
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_notice_to_one_process_lets_both_save_the_same_step_and_leave(tmp_path):
    runs.write_corpus(tmp_path)
    long = ("--train.num-steps", "1000000", "--train.checkpoint-every", "1000000", "--train.eval-every", "1000000",
            "--train.num-samples", "0")
    processes = start_two(tmp_path, "run", *long)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (rows.exists() and rows.read_text()) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [one.communicate()[1] for one in processes]
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGINT)  # which the process sends itself as SIGTERM, the notice that JAX hears
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [4, 4], said
    [step] = steps(tmp_path / "run")
    assert f"stopped: step {step:,} is saved" in said[0][0]
    assert "Traceback" not in said[0][1] + said[1][1]
    more = ("--train.num-steps", str(step + 1), "--train.eval-every", "1000000", "--train.num-samples", "0")
    [(first, _), _] = finish(start_two(tmp_path, "run", *more))
    assert f"resuming after step {step:,}" in first
    assert step + 1 in steps(tmp_path / "run")
