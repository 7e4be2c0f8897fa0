"""A run that starts from another one's model."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from runs import go
from tokmat_jax.commands.flags import parse_config
from tokmat_jax.config import MaturationConfig, ObjectiveConfig, OptimizerConfig
from tokmat_jax.config import adopt as adopting
from tokmat_jax.config.adopt import FOLLOWING, adopt, check_source, follow, value_at
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import init_params, vocabulary_of
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.training import climbing
from tokmat_jax.training.climbing import ClimbWatch
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


def source_config(kind, geometry="sphere", **optimizer):
    """Config of a source of `kind`; with a `raw` table it is pretrained."""
    head = "linear" if geometry == "sphere" else "identity"
    return dataclasses.replace(
        AR, model=dataclasses.replace(AR.model, head=head), table=dataclasses.replace(AR.table, geometry=geometry),
        objective=ObjectiveConfig(kind), optimizer=OptimizerConfig(**optimizer))


@pytest.mark.parametrize(("source", "kind", "want"), [
    (source_config("ar", "raw"), "maturation", (1e-4, 20, "full", 1.0, 0.6, 1.0, 0.6, 0.5, 0.9)),
    (source_config("ar", "raw"), "ar", (1e-4, 20, "uniform", 0.3, 0.9, 0.3, 0.9, 0.0, None)),
    (source_config("ar", learning_rate=7e-4), "maturation", (7e-4, 50, "full", 1.0, 0.6, 1.0, 0.6, 0.5, 0.9)),
    (source_config("maturation", learning_rate=7e-4), "maturation",
     (2e-3, 50, "uniform", 0.3, 0.9, 0.3, 0.9, 0.0, None)),
])
def test_settings_follow_from_the_source(source, kind, want):
    config = dataclasses.replace(tiny.CONFIG, objective=ObjectiveConfig(kind))
    found, changed = follow(config, source, (), begun=False)
    values = dict(zip(FOLLOWING, (*want, 0.0, 8), strict=True))  # what trains a tail stays
    assert {name: value_at(found, name) for name in FOLLOWING} == values
    assert changed == {name: value for name, value in values.items() if value != value_at(config, name)}


def test_a_tail_in_front_of_a_model_trains_at_a_rate_of_its_own():
    settings = MaturationConfig(max_tail_length=4, num_tails=2)
    config = dataclasses.replace(tiny.CONFIG, init_from="base", maturation=settings, objective=ObjectiveConfig("tail"))
    _, changed = follow(config, source_config("ar", "raw"), (), begun=False)
    assert changed == {"optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 20, "objective.negatives": "full",
                       "maturation.self_condition_prob": 0.7, "generation.rate": 1.0, "generation.tail_length": 4}


def test_the_tail_is_generated_as_it_was_trained_unless_that_is_given():
    config = dataclasses.replace(tiny.CONFIG, maturation=MaturationConfig(tail_noise=0.7))
    found, changed = follow(config, source_config("ar"), ("maturation.tail_noise", "generation.max_maturity"), False)
    assert (found.maturation.tail_noise, found.generation.tail_noise) == (0.7, 0.7)
    assert (found.maturation.max_maturity, found.generation.max_maturity) == (0.6, 0.9)
    assert changed.keys() & {"maturation.tail_noise", "generation.max_maturity"} == set()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the import of a tiny Llama and a `run` of one step from it; its flags, and what it printed."""
    folder = tmp_path_factory.mktemp("llama")
    words = runs.imported(folder, **{"train.num-steps": 1, "train.eval-batches": 4})
    words += ["--objective.negatives", "uniform", "--generation.repulsion=0.0"]  # the defaults, but given
    return folder, words, go(*words, "--workdir", str(folder / "run"))


def validations(workdir):
    """{step: validation row} of a run; each step is there once."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in found if "validation/loss" in row]
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row for row in found}


def test_a_pretrained_model_matures_with_settings_of_its_own_that_are_said_once(llama, capsys, monkeypatch):
    folder, flags, printed = llama
    assert (f"from {folder / 'import'}: optimizer.learning_rate 0.0001, optimizer.warmup_steps 20, "
            "maturation.tail_noise 1.0, maturation.max_maturity 0.6, generation.tail_noise 1.0, "
            "generation.max_maturity 0.6, generation.rate 0.9; give a flag to choose otherwise\n") in printed
    assert "step 0 validation  mse " in printed
    begun = load_config(folder / "run")
    assert (begun.optimizer.learning_rate, begun.objective.negatives, begun.generation.repulsion) == (
        1e-4, "uniform", 0.0)
    assert validations(folder / "run").keys() == {0, 1}

    # What would follow now is something else: the run goes on with what it began with.
    monkeypatch.setattr(adopting, "_PRETRAINED", {"optimizer.learning_rate": 3e-4, "optimizer.warmup_steps": 5})
    printed = go(*flags, "--workdir", str(folder / "run"), "--train.num-steps", "2")
    assert "resuming after step 1" in printed
    assert "give a flag" not in printed
    assert "step 0" not in printed
    assert load_config(folder / "run").optimizer == begun.optimizer
    file = folder / "config.py"
    file.write_text("from tokmat_jax.config import Config, OptimizerConfig\n\n\n"
                    "def get_config():\n    return Config(optimizer=OptimizerConfig(learning_rate=5e-4))\n")
    found = parse_config(["--config", str(file), *flags, "--workdir", str(folder / "other")])
    assert (found.optimizer.learning_rate, found.optimizer.warmup_steps) == (5e-4, 5)


def test_a_mistake_in_a_flag_is_named_before_what_it_leads_to(llama):
    # With the default window, which the source's 64 positions are too few for, both are wrong.
    with pytest.raises(UserError, match=r"--optimizer.learning-rat"):
        parse_config(["--init-from", str(llama[0] / "import"), "--optimizer.learning-rat", "1"])


def test_a_loss_that_climbs_is_said_once_with_its_cure(runs_dir, tmp_path, capsys, monkeypatch):
    shutil.copy(runs_dir / "corpus.txt", tmp_path)
    for name, value in (("WINDOW", 2), ("SHARE", 0.0), ("LEAST", -100.0)):  # whatever the loss does is a climb
        monkeypatch.setattr(climbing, name, value)
    runs.run(tmp_path, "run", "--objective.kind", "ar", "--train.num-samples", "0")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "the loss climbs" in line]
    assert line.startswith("warning: step 4: the loss climbs: ")
    assert line.endswith("lower --optimizer.learning-rate (now 0.002), in a new --workdir")


@pytest.mark.parametrize(("later", "climbs"), [(1.2, False), (1.3, True), (0.1, False)])
def test_a_loss_climbs_if_its_median_leaves_its_start_by_a_clear_margin(later, climbs):
    watch = ClimbWatch()
    losses = [*[2.0] * 20, *[later * 2.0] * 10, float("nan"), 90.0, *[later * 2.0] * 40]
    assert [found for loss in losses if (found := watch.climbed(loss))] == ([(2.0, 2.6)] if climbs else [])
