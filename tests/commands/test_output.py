"""Standard output and standard error that cannot be written: no work is lost, and nothing ends in a traceback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from scripts import ROOT, rows
from tokmat_jax import output

PROMPTS = [word for prompt in ("é", "the", "a × b", "") for word in ("--prompt", prompt)]


def start(*args, stdout=None, stderr=None, encoding="utf-8", shell=""):
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=4", "count=1"),
                                "PYTHONIOENCODING": encoding}
    words = ["sh", "-c", f'exec "$0" "$@" {shell}', sys.executable, *map(str, args)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, text=True)


@contextlib.contextmanager
def unread():
    """The end of a pipe that nobody reads."""
    ear, mouth = os.pipe()
    os.close(ear)
    yield mouth
    os.close(mouth)


def trained(folder, name, *more):
    return ["train.py", *runs.arguments(folder, name, "--mesh.data", "1", "--train.num-samples", "0", *more)]


def steps(workdir):
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(("streams", "encoding"), [("closed", "utf-8"), ("full", "latin-1"), ("unread", "ascii")])
def test_streams_that_cannot_be_written_cost_no_checkpoint_and_no_row(runs_dir, tmp_path, streams, encoding):
    runs.write_corpus(tmp_path)
    with {"closed": contextlib.nullcontext, "full": lambda: Path("/dev/full").open("w"), "unread": unread}[streams]() \
            as out:
        how = {"stdout": out, "stderr": out, "encoding": encoding, "shell": ">&- 2>&-" if streams == "closed" else ""}
        training = start(*trained(tmp_path, "run"), **how)
        writing = start("generate.py", "--workdir", runs_dir / "run", *PROMPTS, "--max-new-tokens", "3", "--show-tail",
                        "--output", tmp_path / "rows.jsonl", **how)
        assert (training.wait(300), writing.wait(300)) == (0, 0)
    assert steps(tmp_path / "run") == [3, 6]
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    assert [row["prompt"] for row in rows(tmp_path / "rows.jsonl")] == PROMPTS[1::2]


def test_ctrl_c_that_ends_the_reader_too_saves_the_step(tmp_path):
    runs.write_corpus(tmp_path)
    ear, mouth = os.pipe()
    long = [word for name in ("num-steps", "eval-every", "checkpoint-every") for word in (f"--train.{name}", "1000000")]
    training = start(*trained(tmp_path, "run", *long), stdout=mouth, stderr=mouth)
    os.close(mouth)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert training.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(ear)
    training.send_signal(signal.SIGINT)
    assert training.wait(120) == 130
    assert steps(tmp_path / "run") == [rows(log)[-1]["step"]]


def test_generation_that_nobody_reads_ends_quietly(runs_dir):
    with unread() as out:
        writing = start("generate.py", "--workdir", runs_dir / "run", *PROMPTS, "--max-new-tokens", "3", stdout=out,
                        stderr=subprocess.PIPE)
        assert writing.communicate(timeout=300)[1] == ""
    assert writing.returncode == output.UNREAD


# Without JAX: what every command has in common.
_COMMAND = """
import sys
from rich.console import Console
from tokmat_jax.output import protect_output, stop_unless_read, warn_of_loss
protect_output()
print("é ×", flush=True)
Console().print("│ tail")
print("loss · 1", file=sys.stderr)
warn_of_loss()
stop_unless_read()
"""


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"? ?\n? tail\n"), ("utf-8", "é ×\n│ tail\n".encode()),
                                                 ("latin-1", b"\xe9 \xd7\n? tail\n")])
def test_what_cannot_be_encoded_is_replaced(encoding, shown):
    done = subprocess.run([sys.executable, "-c", _COMMAND], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding},
                          capture_output=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, shown)


def test_a_loss_is_said_unless_the_reader_went_away():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", _COMMAND], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False, timeout=100)
    assert "warning: not all of standard output could be written (No space left on device)\n" in done.stderr
    assert "UserError: cannot write to standard output: No space left on device" in done.stderr
    with unread() as out:
        done = subprocess.run([sys.executable, "-c", _COMMAND], cwd=ROOT, stdout=out, stderr=subprocess.PIPE,
                              text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (output.UNREAD, "loss · 1\n")
