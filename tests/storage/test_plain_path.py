"""Folders of any name, which libraries that write and read there must not take for something else."""

import glob
import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tokmat_jax.config import Config, DataConfig, TokenizerConfig
from tokmat_jax.data import sources
from tokmat_jax.data.corpus import prepare
from tokmat_jax.errors import UserError
from tokmat_jax.storage.checkpoint import load_params, save_params
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.training.metrics_log import MetricsLog
from train_states import SHAPES, restore, state, write

NAMES = ["run[1]", "[!x]", "x[0:5]", "a*b", "**", "q?", "a\\b", "100%", "#x", "two words", "new\nline", "ümlaut",
         "-dash", "{a,b}", "~", "gs:", "a:b"]


def checkpoints(folder):
    """Beside another run, whose files the name would match as a pattern."""
    write(folder.with_name("axb"), 2)
    write(folder, 1, 2)
    found, position, steps = restore(folder)
    assert (int(found.step), position, steps) == (2, 20, [1, 2])
    np.testing.assert_array_equal(found.params["table"], state(2).params["table"])


def weights(folder):
    save_params(folder, state(0).params)
    assert load_params(folder, SHAPES.params)[1] == 0


def corpus(folder):
    Path("text").write_text("a cat sat. " * 99)
    data = DataConfig(source="files:text", seq_len=32, prepared_dir=str(folder))
    made = prepare(Config(data=data, tokenizer=TokenizerConfig("bytes")))
    assert made.folder.is_relative_to(folder)
    for split in ("train", "validation"):
        assert made.windows(split)[0]["tokens"].shape == (32,)


def parquet(folder):
    folder.mkdir()
    table = pa.table({"text": ["one", "two"]})
    pq.write_table(table, (folder / "x.parquet").absolute())
    pattern = glob.escape(str(folder / "x.parquet"))
    if "," not in pattern:  # which separates patterns
        assert [*sources.documents(DataConfig(source=f"files:{pattern}"))] == ["one", "two"]


def curves(folder):
    folder.mkdir()
    log = MetricsLog(folder, 0)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    assert [path.stat().st_size > 0 for path in (folder / "tensorboard").iterdir()] == [True]


def compiled(folder):
    before, numbers = jax.config.values["jax_compilation_cache_dir"], itertools.count()
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + next(numbers))(jnp.ones(3))
        assert any(folder.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def profile(folder):
    with jax.profiler.trace(folder):
        jnp.ones(3).block_until_ready()
    assert [*folder.rglob("*.xplane.pb")]


@pytest.mark.parametrize("use", [checkpoints, weights, corpus, parquet, curves, compiled, profile])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, use):
    for number, name in enumerate(NAMES):
        place = tmp_path / str(number)
        place.mkdir()
        monkeypatch.chdir(place)
        use(Path(name))
        assert {path.name for path in place.iterdir()} - {"axb", "text"} == {name}, "written elsewhere"


def test_the_path_of_a_folder_is_its_own_and_plain(tmp_path):
    names = [name for name in NAMES if set(name) & set("*?[\\") or name == "gs:"]
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    plain = [plain_path(folder) for folder in folders]
    assert plain == [plain_path(folder) for folder in folders]
    assert [os.path.realpath(path) for path in plain] == [str(folder) for folder in folders]
    assert not any(set(str(path)) & set("*?[]\\:") for path in plain)
    folders[0].rename(tmp_path / "elsewhere")
    folders[0].mkdir()
    assert plain_path(folders[0]) not in plain
    assert plain_path(tmp_path) == tmp_path


def test_what_is_written_and_cannot_be_read_again_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tokmat_jax.storage.checkpoint.plain_path", Path.resolve)
    begins = (lambda folder: write(folder, 1), lambda folder: save_params(folder, state(1).params))
    for number, begin in enumerate(begins):
        with pytest.raises(UserError, match=r"checkpoints/[01] was written but cannot be read again \(.*\): choose"):
            begin(tmp_path / f"run[{number}]")
