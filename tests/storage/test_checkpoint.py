"""Checkpoints whose files were damaged, or could not be written."""

import gc
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import runs
from scripts import stored
from tokmat_jax.commands import train
from tokmat_jax.config import MeshConfig
from tokmat_jax.distributed.mesh import make_mesh
from tokmat_jax.errors import UserError
from tokmat_jax.output import logged_warnings
from tokmat_jax.storage import checkpoint
from tokmat_jax.storage.checkpoint import Checkpoints, load_params, save_params
from tokmat_jax.storage.integrity import bit_sum, is_sealed, seal
from tokmat_jax.training.metrics_log import JsonLines, MetricsLog
from train_states import SHAPES, restore, state, write

# Orbax leaves futures behind when a read or a write fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with the checkpoints 1 and 2."""
    return write(tmp_path_factory.mktemp("two"), 1, 2)


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
    content = bytearray(path.read_bytes())
    if content:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


READ = ("data/metadata", "params/d/", "optimizer/d/")
"""Where the arrays and the position are."""

DAMAGE = {
    "missing": lambda path, _: path.unlink(),
    "truncated": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
}


def survives(two, workdir, name, kind, seed):
    """Damages one file of checkpoint 2 and restores; returns whether checkpoint 2 was still what had been written."""
    shutil.copytree(two, workdir)
    DAMAGE[kind](workdir / "checkpoints" / "2" / name, np.random.default_rng(seed))
    found, position, steps = restore(workdir)
    step = int(found.step)
    assert position == 10 * step
    chex.assert_trees_all_equal(found, state(step))
    # It is either the newest, whole, or the one before, with the newest set aside.
    assert steps == list(range(1, step + 1))
    assert (workdir / "damaged" / "2").is_dir() == (step == 1)
    return step == 2


def test_whatever_file_is_damaged_the_state_is_one_that_was_written(two, tmp_path, capsys):
    # Whatever is read is damaged in every way; Orbax's files about itself, in turn, in one.
    chosen = [(name, kind) for index, name in enumerate(files(two / "checkpoints" / "2"))
              for number, kind in enumerate(DAMAGE) if str(name).startswith(READ) or index % 3 == number]
    whole = {(str(name), kind): survives(two, tmp_path / str(index), name, kind, index)
             for index, (name, kind) in enumerate(chosen)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == list(whole.values()).count(False)
    for line in said:
        assert line.startswith("warning: ")
        assert "checkpoints/2 is damaged (" in line
        assert line.endswith("going on from step 1")
    assert not any(whole[key] for key in whole if key[0].startswith(READ))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_anywhere_is_found_or_means_nothing(two, tmp_path, seed):
    for index, name in enumerate(files(two / "checkpoints" / "2")):
        survives(two, tmp_path / str(index), name, "flipped", [seed, index])


def test_a_run_goes_back_as_far_as_it_must_and_never_to_the_start(tmp_path, capsys):
    workdir = write(tmp_path / "run", 1, 2, 3)
    for step in (3, 2):
        (workdir / "checkpoints" / str(step) / "data" / "metadata").unlink()
    found, position, steps = restore(workdir)
    assert (int(found.step), position, steps) == (1, 10, [1])
    said = capsys.readouterr().err.splitlines()
    assert ["checkpoints/3 is damaged" in said[0], "checkpoints/2 is damaged" in said[1], len(said)] == [True, True, 2]
    (workdir / "checkpoints" / "1" / "data" / "metadata").write_text("{}")
    write(workdir, 2)
    (workdir / "checkpoints" / "2" / "data" / "metadata").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: 2 is damaged .*; 1 is damaged .*not what"):
        restore(workdir)
    # Nothing to go on from, so nothing is moved.
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"2", "3"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2"}


def test_what_orbax_warns_of_is_a_line(two, tmp_path, capsys):
    shutil.copytree(two, tmp_path / "run")
    lost = tmp_path / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    lost.unlink()
    with logged_warnings("absl"):
        assert restore(tmp_path / "run")[1:] == (20, [1, 2])
    assert capsys.readouterr().err == f"warning: Metadata file does not exist: {lost}\n"


@pytest.mark.parametrize("error", [
    ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), MemoryError(),
    PermissionError(13, "Permission denied")], ids=["device memory", "memory", "permission"])
def test_what_the_machine_refuses_is_no_damage(two, tmp_path, monkeypatch, error):
    shutil.copytree(two, tmp_path / "run")

    def refuse(*_, **__):
        raise error

    checkpoints = Checkpoints(tmp_path / "run", keep=9)
    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(UserError, match="checkpoints/2 cannot be read now: "):
        checkpoints.restore(SHAPES)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2"]


def test_a_checkpoint_without_a_seal_is_taken_as_it_is_and_its_shapes_are_checked(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "2" / "data" / "metadata").write_text('{"position": 20}')
    found, position, steps = restore(tmp_path / "run")
    assert (position, steps) == (20, [1, 2])
    chex.assert_trees_all_equal(found, state(2))
    other = {**SHAPES.params, "table": jax.ShapeDtypeStruct((5, 4), jnp.float32)}
    with pytest.raises(UserError, match=r"params/table is float32 \(4, 4\), the config wants float32 \(5, 4\)"):
        load_params(tmp_path / "run", other)
    save_params(tmp_path / "imported", state(0).params)
    shutil.rmtree(tmp_path / "imported" / "checkpoints" / "0" / "data")
    chex.assert_trees_all_equal(load_params(tmp_path / "imported", SHAPES.params)[0], state(0).params)


def test_a_checkpoint_that_a_run_removes_meanwhile_is_no_damage(two, tmp_path, monkeypatch):
    shutil.copytree(two, tmp_path / "run")
    read = checkpoint._read

    def removed(manager, step, shapes):
        if step == 2:
            write(tmp_path / "run", 3)
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        return read(manager, step, shapes)

    monkeypatch.setattr(checkpoint, "_read", removed)
    assert load_params(tmp_path / "run", SHAPES.params)[1] == 3


def test_a_step_that_was_damaged_can_be_saved_and_damaged_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for _ in range(2):
        (tmp_path / "run" / "checkpoints" / "2" / "data" / "metadata").unlink()
        restore(tmp_path / "run")
        write(tmp_path / "run", 2)
    assert {path.name for path in (tmp_path / "run" / "damaged").iterdir()} == {"2", "2-1"}


@pytest.mark.parametrize(("change", "says"), [
    (lambda params: {**params, "table": params["table"].astype(jnp.bfloat16)},
     "params/table is bfloat16 (4, 4), the config wants float32 (4, 4)"),
    (lambda params: {**params, "table": params["table"][:3]},
     "params/table is float32 (3, 4), the config wants float32 (4, 4)"),
    (lambda params: {**params, "readout": params["table"]}, "params/readout has no place in the config's model"),
    (lambda params: {"table": params["table"]}, "params/backbone/kernel is missing, the config wants float32 (8, 512)"),
], ids=["type", "shape", "more", "less"])
def test_what_does_not_fit_the_config_is_refused_and_stays_where_it_is(two, tmp_path, change, says):
    shutil.copytree(two, tmp_path / "run")
    other = state(3).replace(params=change(state(3).params))
    checkpoints = Checkpoints(tmp_path / "run", keep=9)
    checkpoints.save(other, position=30)
    checkpoints.close()
    for read in (restore, lambda workdir: load_params(workdir, SHAPES.params)):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "run")
        assert f"checkpoints/3: {says}" in str(caught.value)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "run" / "damaged").exists()


def test_what_is_half_written_is_not_listed_and_goes(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    # As Orbax calls a step until all of it is there.
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp-0")
    (folder / "3.orbax-checkpoint-tmp-0" / "data" / "metadata").unlink()
    assert load_params(tmp_path / "run", SHAPES.params)[1] == 2
    assert restore(tmp_path / "run")[2] == [1, 2]
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_imported_weights_are_checked_too(tmp_path):
    save_params(tmp_path / "run", state(0).params)
    chex.assert_trees_all_equal(load_params(tmp_path / "run", SHAPES.params), (state(0).params, 0))
    step = tmp_path / "run" / "checkpoints" / "0"
    facts = json.loads((step / "data" / "metadata").read_text())
    facts["arrays"]["params/table"]["sum"] ^= 1
    (step / "data" / "metadata").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"checkpoints/0 is damaged \(data/metadata is not what was written\)"):
        load_params(tmp_path / "run", SHAPES.params)
    facts.pop("digest")
    (step / "data" / "metadata").write_text(json.dumps(seal(facts)))
    with pytest.raises(UserError, match=r"damaged \(the bits of params/table are not those that were written\)"):
        load_params(tmp_path / "run", SHAPES.params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_the_sum_of_bits_knows_every_bit_and_every_place(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    expected = sum(int(bit) * (2 * i + 1) for i, bit in enumerate(bits)) % 2**32
    assert int(bit_sum(jnp.asarray(array))) == expected
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = array.copy()
        one = changed.reshape(-1).view(f"u{array.dtype.itemsize}")
        one[rng.integers(24)] ^= one.dtype.type(1 << rng.integers(8 * array.dtype.itemsize))
        assert int(bit_sum(jnp.asarray(changed))) != expected


def test_the_sum_is_the_same_on_any_mesh():
    array = jnp.arange(64.0).reshape(8, 8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    assert int(jax.jit(bit_sum)(spread)) == int(bit_sum(array))


def test_a_seal_is_broken_by_any_change():
    facts = seal({"step": 3, "position": 7})
    assert is_sealed(json.loads(json.dumps(facts)))
    for broken in (facts | {"position": 8}, {"step": 3, "position": 7}, facts | {"more": 1}, None, [], {}):
        assert not is_sealed(broken)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; skips where none can be made."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=False,
                      capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, left: int) -> Path:
    """Writes a file that leaves `left` bytes of the disk."""
    free = os.statvfs(place)
    (place / "filling").write_bytes(b"\1" * max(free.f_bavail * free.f_frsize - left, 0))
    return place / "filling"


@pytest.mark.parametrize(("left", "foreseen"), [(0, True), (0, False), (20_000, False), (50_000, False)])
def test_a_full_disk_costs_no_checkpoint_and_is_tried_again(small_disk, capsys, monkeypatch, left, foreseen):
    if not foreseen:  # it fills while the checkpoint is being written
        monkeypatch.setattr(checkpoint, "_check_room", lambda *_: None)
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)
    checkpoints = Checkpoints(small_disk / "run", keep=1)
    checkpoints.finish(state(1), position=10)
    filling = fill(small_disk, left)
    with logged_warnings("absl"), logged_warnings("asyncio"):
        checkpoints.save(state(2), position=20)
        while checkpoints._manager.is_saving_in_progress():
            pass
        assert checkpoints.due()
        gc.collect()
    assert checkpoints.newest() == "the last good checkpoint is step 1"
    said = capsys.readouterr().err.splitlines()
    assert said
    for line in said:  # and nothing of what Orbax says about it
        assert line.startswith("warning: cannot save a checkpoint in")
        assert line.endswith("the last good checkpoint is step 1, and saving is retried")
    deadline = time.monotonic() + 30  # threads that are still writing may bring the unfinished step back for a moment
    while (names := [path.name for path in (small_disk / "run" / "checkpoints").iterdir()]) != ["1"]:
        assert time.monotonic() < deadline, names
        checkpoints.due()
    chex.assert_trees_all_equal(load_params(small_disk / "run", SHAPES.params), (state(1).params, 1))

    filling.unlink()
    checkpoints.finish(state(3), position=30)
    assert not checkpoints.due()
    checkpoints.close()
    found, position, steps = restore(small_disk / "run")
    chex.assert_trees_all_equal(found, state(3))
    assert (position, steps) == (30, [3])


def test_a_disk_that_stays_full_ends_in_one_line(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint, "LAST_RETRIES", 2)
    checkpoints = Checkpoints(small_disk / "run", keep=1)
    checkpoints.finish(state(1), position=10)
    fill(small_disk, 0)
    with pytest.raises(UserError, match=r"step 2 could not be saved in .*; the last good checkpoint is step 1: make"):
        checkpoints.finish(state(2), position=20)
    checkpoints.close()


def test_rows_wait_until_there_is_room(small_disk, capsys):
    log = MetricsLog(small_disk, resume_step=0)
    log.write(1, "train", {"loss": 1.0})
    filling = fill(small_disk, 0)
    # What a page of the file still holds fits; so many rows do not.
    for step in range(2, 200):
        log.write(step, "train", {"loss": float(step)})
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" (")[0] for line in said) == [
        f"warning: cannot write {small_disk / name}" for name in ("metrics.jsonl", "tensorboard")]
    filling.unlink()
    log.write(200, "train", {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 201))
    assert len(list((small_disk / "tensorboard").iterdir())) == 2  # the second one begins behind the gap
    assert capsys.readouterr().err == ""


def test_rows_for_which_there_never_is_room_are_counted(small_disk, capsys):
    lines = JsonLines(small_disk / "rows.jsonl", resume_step=0)
    fill(small_disk, 0)
    for step in range(3):
        lines.write({"step": step, "text": "x" * 5000})
    lines.close()
    assert "rows.jsonl lacks its last 3 row(s)" in capsys.readouterr().err


def test_a_run_on_a_disk_that_is_full_for_a_while_loses_nothing(small_disk, runs_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)
    runs.write_corpus(tmp_path)
    validate, filling = train.Loop.validate, []

    def meanwhile(loop, step):
        validate(loop, step)
        if step == 3:  # the checkpoint of this step comes next
            filling.append(fill(small_disk, 0))
        elif filling:
            filling.pop().unlink()

    monkeypatch.setattr(train.Loop, "validate", meanwhile)
    runs.run(tmp_path, "run", "--workdir", str(small_disk / "run"), "--train.keep-checkpoints", "1")
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "there is no checkpoint yet, and saving is retried" in said
    whole, full = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (
        runs_dir / "run", small_disk / "run"))
    assert [json.loads(line)["step"] for line in full] == [json.loads(line)["step"] for line in whole]
    for item in ("params", "optimizer"):
        chex.assert_trees_all_equal(stored(small_disk / "run", item), stored(runs_dir / "run", item))


def test_a_workdir_that_can_only_be_read_is_refused_before_any_work(small_disk, tmp_path):
    runs.write_corpus(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"--workdir: cannot write into .*: Read-only file system"):
        runs.run(tmp_path, "run", "--workdir", str(small_disk / "run"))
    assert not (tmp_path / "prepared").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_as_ever(runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "6" / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    runs.run(runs_dir, "run", "--workdir", str(tmp_path / "run"))
    shown = capsys.readouterr()
    assert f"{tmp_path}/run/checkpoints/6 is damaged (" in shown.err
    assert f"was moved to {tmp_path}/run/damaged/6: going on from step 3" in shown.err
    assert "resuming after step 3" in shown.out
    chex.assert_trees_all_equal(stored(tmp_path / "run"), stored(runs_dir / "run"))
