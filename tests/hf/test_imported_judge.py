"""A judge that is a checkpoint: imported once, and anew where it is another one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from tokmat_jax.commands import evaluate
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import import_weights


@pytest.fixture
def load(tmp_path):
    """The judge from a checkpoint in a folder, and its workdir."""
    import_weights(str(checkpoints.write(_made(tmp_path / "of_baseline"))), tmp_path / "baseline")
    baseline = Generator.from_workdir(tmp_path / "baseline")

    def load(source: Path):
        return evaluate.load_judge(evaluate.Args("run", "ar", judge=str(source)), baseline, tmp_path / "report")

    return load


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_checkpoint_is_imported_once_and_anew_when_it_has_changed(load, tmp_path):
    source = checkpoints.write(_made(tmp_path / "judge"))
    before, workdir = load(source)
    (workdir / "kept").write_text("")
    assert load(source)[1] == workdir
    assert (workdir / "kept").exists()
    checkpoints.store(source, **{checkpoints.TABLE: 2.0 * checkpoints.weights()[checkpoints.TABLE]})
    after, _ = load(source)
    np.testing.assert_array_equal(after.generator.vocabulary.table, 2.0 * before.generator.vocabulary.table)


def test_two_checkpoints_of_one_name_are_two_judges(load, tmp_path):
    one = checkpoints.write(_made(tmp_path / "a" / "judge"))
    other = shutil.copytree(one, tmp_path / "b" / "judge")
    assert load(one)[1] != load(other)[1]
