"""A run that starts from another one's model."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from tokmat_jax.commands.flags import parse_config
from tokmat_jax.config import ObjectiveConfig
from tokmat_jax.config.adopt import adopt, check_source
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import init_params, vocabulary_of
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.training.start_from import initial_params

AR = dataclasses.replace(tiny.CONFIG, objective=ObjectiveConfig(kind="ar"))
IDS = jax.random.randint(jax.random.key(9), (3, 48), 0, tiny.VOCAB)


def predict(params, config, maturity=1.0, tail_length=0):
    tokens = vocabulary_of(params, config)
    positions = jnp.broadcast_to(jnp.arange(48)[None], (3, 48))
    told = jnp.full((3,), tail_length)
    level = jnp.full((3, 48), maturity)
    output, _ = make_forward(config)(params["backbone"], tokens.table[IDS], level, told, positions)
    return np.asarray(output), np.asarray(output @ tokens.readout.T)


@pytest.mark.parametrize("film", ["once", "per_layer"])
def test_a_matured_baseline_begins_as_itself_at_every_maturity_and_tail_but_short(film):
    model = dataclasses.replace(AR.model, film=film)
    source_config = dataclasses.replace(AR, model=model)
    config = adopt(tiny.CONFIG, source_config, "ar", "maturation")
    assert config.model == dataclasses.replace(model, max_positions=48)
    source = tiny.shaken_params(source_config)
    params = initial_params(source, init_params(jax.random.key(5), config, tiny.VOCAB), IDS, source_config, config)
    was, _ = predict(source, source_config)
    for maturity, tail_length in [(1.0, 0), (0.3, 5), (0.0, 16)]:
        now, _ = predict(params, config, maturity, tail_length)
        ratio = np.linalg.norm(now) / np.linalg.norm(was)
        np.testing.assert_allclose(now, ratio * was, atol=1e-4 * np.abs(now).max())
        np.testing.assert_allclose(np.linalg.norm(now, axis=-1).mean(), 0.5, rtol=1e-4)


def test_an_imported_model_goes_on_as_it_was_or_is_set_on_the_sphere():
    model = dataclasses.replace(AR.model, head="identity", input_norm=2.0)
    table = dataclasses.replace(AR.table, geometry="raw", radius=2.0)
    source_config = dataclasses.replace(AR, model=model, table=table, objective=ObjectiveConfig("ar", logit_scale=1.0))
    source = init_params(jax.random.key(0), source_config, tiny.VOCAB)
    again = adopt(tiny.CONFIG, source_config, "imported", "ar")
    params = initial_params(source, init_params(jax.random.key(5), again, tiny.VOCAB), IDS, source_config, again)
    np.testing.assert_allclose(predict(params, again)[1], predict(source, source_config)[1], atol=1e-5)

    config = adopt(tiny.CONFIG, source_config, "imported", "maturation")
    assert (config.table.geometry, config.table.radius, config.model.head) == ("sphere", 2.0, "linear")
    params = initial_params(source, init_params(jax.random.key(5), config, tiny.VOCAB), IDS, source_config, config)
    rows = vocabulary_of(params, config).table
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 2.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(predict(params, config)[0], axis=-1).mean(), 1.0, rtol=1e-4)


def test_an_output_table_of_its_own_is_read_through_the_head():
    table = dataclasses.replace(AR.table, geometry="raw", tied=False)
    model = dataclasses.replace(AR.model, head="identity")
    source_config = dataclasses.replace(AR, table=table, model=model)
    source = init_params(jax.random.key(0), source_config, tiny.VOCAB)
    mixed = jax.random.normal(jax.random.key(1), (16, 16))
    config = adopt(tiny.CONFIG, source_config, "imported", "maturation")
    # Where W is a linear image of E on the sphere, the least-squares head reproduces its ranking.
    rows = vocabulary_of({"table": source["table"]}, config).table
    source["readout"] = rows @ mixed
    params = initial_params(source, init_params(jax.random.key(5), config, tiny.VOCAB), IDS, source_config, config)
    kernel = np.asarray(params["backbone"]["head"]["kernel"])
    scale = np.vdot(kernel, mixed.T) / np.vdot(mixed, mixed)
    np.testing.assert_allclose(kernel, scale * mixed.T, atol=1e-3 * np.abs(kernel).max())


@pytest.mark.parametrize(("field", "value"), [("num_layers", 3), ("num_heads", 4), ("norm", "rms")])
def test_another_shape_is_refused_by_name(field, value):
    config = adopt(tiny.CONFIG, AR, "runs/ar", "maturation")
    check_source(config, AR)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **{field: value}))
    with pytest.raises(UserError, match=rf"runs/ar has model\.{field}"):
        check_source(other, AR)


def test_a_run_that_has_begun_needs_its_source_no_more(runs_dir, tmp_path):
    source, prepared = tmp_path / "ar", tmp_path / "prepared"
    shutil.copytree(runs_dir / "ar", source)
    more = ["--init-from", str(source), "--data.prepared-dir", str(prepared), "--workdir", str(tmp_path / "run[1]"),
            "--data.source", f"files:{runs_dir}/corpus.txt"]
    workdir = tmp_path / "run[1]"
    runs.run(tmp_path, "", *more, "--train.num-steps", "3", "--train.sample-every", "9", "--train.num-samples", "0")
    begun = load_config(workdir)
    source.rename(tmp_path / "away")
    shutil.rmtree(prepared)
    file = tmp_path / "config.py"
    file.write_text(f"from tokmat_jax.config import Config\n\n\ndef get_config():\n    return Config({str(source)!r})\n"
                    .replace("Config('", "Config(init_from='"))
    flags = [word for word in runs.arguments(tmp_path, "", *more) if word not in ("--init-from", str(source))]
    found = parse_config(["--config", str(file), *flags])
    assert dataclasses.replace(found, train=begun.train) == begun
    runs.run(tmp_path, "", *more)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    assert Generator.from_workdir(workdir).generate(["the cat"])[0].tokens
    with pytest.raises(UserError, match="is not a run directory"):
        parse_config([*flags, "--init-from", str(source), "--workdir", str(tmp_path / "another")])
