"""Runs that are asked to stop, whose numbers go wrong, or that meet another run."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from loading import Source, taken
from scripts import ROOT, rows, stored
from tokmat_jax.commands import data, train
from tokmat_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from tokmat_jax.data.loader import train_batches
from tokmat_jax.distributed.mesh import make_mesh
from tokmat_jax.errors import UserError
from tokmat_jax.storage.workdir import lock_workdir, refuse_links
from tokmat_jax.training import spikes, stopping
from tokmat_jax.training.step import make_train_functions


def heard(stop):
    """The exit code that `stop` asks for, once it has heard of it."""
    deadline = time.monotonic() + 30
    while (code := stop.after(1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 4), (signal.SIGHUP, 4), (signal.SIGUSR1, 4),
                                              (signal.SIGINT, 130)])
def test_a_signal_is_an_exit_code_and_afterwards_what_it_was_before(number, code):
    outside = signal.signal(number, signal.default_int_handler)  # under nohup a hangup would be ignored
    try:
        with stopping.stop_signals() as stop:
            assert stop.after(1) is None
            os.kill(os.getpid(), number)
            assert heard(stop) == code
        assert signal.getsignal(number) is signal.default_int_handler
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(number, outside)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with stopping.stop_signals() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert heard(stop) == 130
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_heard_and_nothing_fails():
    found = []

    def ask():
        with stopping.stop_signals() as stop:
            found.append(stop.after(1))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [None]


# The main thread never comes back to Python, as in a long compilation; the save would never end.
_BUSY = """
import time
from tokmat_jax.training.stopping import stop_signals
with stop_signals() as stop:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_ctrl_c_leaves_at_once():
    process = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again leaves at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "left at once\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 4), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_bit_equal(runs_dir, tmp_path, capsys, monkeypatch,
                                                                          number, code):
    runs.write_corpus(tmp_path)
    ask, asked = stopping.Stop.after, []

    def signalled(stop, step):
        if step == 4 and not asked:
            asked.append(step)
            os.kill(os.getpid(), number)
            heard(type("Asked", (), {"after": lambda _, step: ask(stop, step)})())
        return ask(stop, step)

    monkeypatch.setattr(stopping.Stop, "after", signalled)
    with pytest.raises(SystemExit) as left:
        runs.run(tmp_path, "run")
    assert left.value.code == code
    assert "stopped: step 4 is saved; the same command goes on" in capsys.readouterr().out
    assert stored(tmp_path / "run")[0] == 4
    runs.run(tmp_path, "run")
    for item in ("params", "optimizer"):
        chex.assert_trees_all_equal(stored(tmp_path / "run", item), stored(runs_dir / "run", item))


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
    runs.write_corpus(tmp_path)
    (tmp_path / "run").mkdir()
    with lock_workdir(tmp_path / "run"), pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on"):
        runs.run(tmp_path, "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = ("import sys, time, pathlib; from tokmat_jax.storage.workdir import lock_workdir; "
            "kept = lock_workdir(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on"):
        lock_workdir(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    lock_workdir(tmp_path).close()


def test_a_link_out_of_the_workdir_is_refused_and_one_within_is_not(tmp_path):
    runs.write_corpus(tmp_path)
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    workdir.mkdir()
    elsewhere.mkdir()
    (workdir / "inside").symlink_to(workdir / "metrics.jsonl")
    refuse_links(workdir)
    (tmp_path / "link").symlink_to(workdir)
    refuse_links(tmp_path / "link")
    for name in ("checkpoints", "metrics.jsonl", "config.json.unfinished"):
        (workdir / name).symlink_to(elsewhere / name)
        with pytest.raises(UserError, match=f"{name} is a link to .*elsewhere.*, outside the workdir"):
            runs.run(tmp_path, "run")
        (workdir / name).unlink()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.usefixtures("optax_promotion")
@pytest.mark.parametrize("bad", ["the loss", "the parameters"])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(bad):
    config = dataclasses.replace(
        tiny.CONFIG, objective=ObjectiveConfig(negatives="weighted")) if bad == "the loss" else dataclasses.replace(
        tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=3e38, warmup_steps=0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, 300, mesh)
        state = functions.init(jax.random.key(0))
        before = jax.device_get(state)
        unigram = jnp.full(300, np.nan if bad == "the loss" else 1 / 300)
        ids = jnp.ones((config.train.batch_size, config.data.seq_len), jnp.int32)
        after, metrics = functions.step(state, ids, unigram)
    assert float(metrics["skipped"]) == 1.0
    assert math.isfinite(metrics["loss"]) == (bad != "the loss")
    assert int(after.step) == 1
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))


@pytest.fixture
def breaking(monkeypatch):
    """Breaks the loss of the steps that are put into the set returned."""
    steps, made = set(), train.make_train_functions

    def functions(*args):
        whole = made(*args)

        def step(state, ids, unigram):
            return whole.step(state, ids, unigram * np.nan if int(state.step) + 1 in steps else unigram)

        return type(whole)(whole.init, step, whole.evaluate, whole.shapes)

    monkeypatch.setattr(train, "make_train_functions", functions)
    return steps


WEIGHTED = ("--objective.negatives", "weighted", "--train.num-samples", "0")


def test_a_skipped_step_is_counted_shown_and_written_with_the_place_of_its_batch(tmp_path, capsys, breaking):
    runs.write_corpus(tmp_path)
    breaking |= {3, 5}
    workdir = runs.run(tmp_path, "run", *WEIGHTED)
    shown = capsys.readouterr().out
    assert "step 3, skipped: loss is nan, grad_norm is nan" in shown
    assert "the batch is at position 4" in shown
    assert [(row["step"], row["position"], row["skipped"], row["loss"]) for row in rows(workdir / "spikes.jsonl")] == [
        (3, 2, True, "nan"), (5, 4, True, "nan")]
    logged = {row["step"]: row for row in rows(workdir / "metrics.jsonl") if "train/skipped" in row}
    assert {step: row["train/skipped"] for step, row in logged.items()} == {2: 0.0, 3: 1.0, 4: 0.0, 6: 1.0}
    assert "train/loss" not in logged[3]
    assert math.isfinite(logged[6]["train/loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored(workdir)[1]))


def test_too_many_skipped_in_a_row_stop_the_run_at_its_last_good_checkpoint(tmp_path, breaking):
    runs.write_corpus(tmp_path)
    breaking |= {2, 4, 5}
    with pytest.raises(UserError, match=r"loss is nan.* at step 5 \(2 skipped in a row\); the last good "
                                        r"checkpoint is step 3"):
        runs.run(tmp_path, "run", *WEIGHTED, "--train.max-skipped", "1")
    assert stored(tmp_path / "run")[0] == 3
    breaking.clear()
    workdir = runs.run(tmp_path, "run", *WEIGHTED, "--train.max-skipped", "0")
    assert [row["step"] for row in rows(workdir / "spikes.jsonl")] == [2]  # what came behind the checkpoint is undone


def test_a_spike_names_its_batch_which_can_be_read_and_left_out(tmp_path, capsys, monkeypatch):
    runs.write_corpus(tmp_path)
    monkeypatch.setattr(spikes, "FEWEST", 1)
    monkeypatch.setattr(spikes, "DEVIATIONS", -1e9)  # every loss is one
    workdir = runs.run(tmp_path, "run", "--train.num-samples", "0")
    found = rows(workdir / "spikes.jsonl")
    assert [(row["step"], row["position"], row["skipped"]) for row in found] == [
        (step, step - 1, False) for step in (2, 3, 4, 5, 6)]
    assert "step 6: loss " in capsys.readouterr().out
    data.main(["batch", "--workdir", str(workdir), "--position", "4"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("---")] == [
        f"--- batch 4, window {number} of 4" for number in (1, 2, 3, 4)]
    assert "the sea" in shown
    runs.run(tmp_path, "run", "--train.num-samples", "0", "--train.num-steps", "8", "--train.skip-batches", "6", "7")
    assert [(row["step"], row["position"]) for row in rows(workdir / "spikes.jsonl")[5:]] == [(8, 9)]


@pytest.mark.parametrize(("args", "says"), [
    (["batch", "--workdir", "/nowhere", "--position", "1"], "is not a run directory"),
    (["batch", "--workdir", "x", "--position", "-1"], "--position must lie in 0..1,099,511,627,775, found -1"),
    (["batch", "--workdir", "x", "--positon", "1"], "--position"),
    (["bach"], "unknown command 'bach'; there are prepare, batch and own"),
])
def test_what_batch_cannot_show_is_one_line(args, says):
    with pytest.raises(UserError) as caught:
        data.main(args)
    assert says in str(caught.value)


def test_batches_are_left_out_wherever_reading_begins():
    every = taken(train_batches(Source(12), 3, seed=0), 9)
    some = train_batches(Source(12), 3, seed=0, left_out=(0, 4, 5, 8))
    assert taken(some, 5) == [every[position] for position in (1, 2, 3, 6, 7)]
    some.seek(4)
    assert taken(some, 1) == [every[6]]
    assert some.position == 7


def test_a_spike_is_what_stands_far_above_the_losses_before():
    watch = spikes.LossWatch()
    rng = np.random.default_rng(0)
    noise = rng.normal(3.0, 0.1, 200)
    assert [watch.expected(loss) for loss in noise] == [None] * 200
    assert watch.expected(float("nan")) is None
    assert watch.expected(4.0) == pytest.approx(noise[-100:].mean())
    assert watch.expected(2.0) is None
    assert spikes.LossWatch().expected(1e9) is None
    still = spikes.LossWatch()
    assert [still.expected(2.0) for _ in range(30)] == [None] * 30
    assert still.expected(2.1) is None  # less than 6 % more
    assert still.expected(2.5) is not None
    assert json.loads(json.dumps(still.expected(9.0))) > 2.0


def test_a_batch_that_was_learned_from_cannot_be_left_out_and_a_line_says_so(tmp_path, capsys):
    runs.write_corpus(tmp_path)
    quiet = ("--train.num-samples", "0", "--train.skip-batches")
    runs.run(tmp_path, "run", *quiet, "1")
    capsys.readouterr()
    runs.run(tmp_path, "run", *quiet, "1", "4", "9", "--train.num-steps", "7")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.skip_batches:")]
    assert said == ["train.skip_batches: batch 4 has been learned from before step 6; to leave it out, move the "
                    "checkpoints behind it away"]


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*lock: Is a directory"):
        lock_workdir(tmp_path)
