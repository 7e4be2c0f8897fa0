"""A tail in front of a language model: the model stays as it is, says what it said, and is told by its own tail."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import checkpoints
import runs
import tiny
from runs import go
from tokmat_jax.commands import data, evaluate
from tokmat_jax.commands import hf as commands
from tokmat_jax.commands.flags import parse_config
from tokmat_jax.config import (
    AdapterConfig,
    GenerationConfig,
    MaturationConfig,
    ObjectiveConfig,
    RopeConfig,
    TableConfig,
    TokenizerConfig,
)
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.generation.baselines import Baselines
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf import tail as tail_files
from tokmat_jax.hf.convert import export_weights, import_weights
from tokmat_jax.method import losses
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.lora import split_params
from tokmat_jax.model.params import init_params
from tokmat_jax.training import objective

PROMPTS = [[5, 6, 7], [9, 8], [30, 31, 5, 6, 7]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the `import` of a tiny Llama and a `run` with a tail in front of it; its flags."""
    folder = tmp_path_factory.mktemp("front")
    words = runs.imported(folder, **{
        "train.eval-batches": 1, "train.num-samples": 1, "train.num-steps": 3, "objective.kind": "tail",
        "maturation.num-tails": 3, "maturation.max-tail-length": 4, "maturation.self-condition-prob": 0.7,
        "adapter.rank": 2, "generation.tail-length": 4, "generation.max-new-tokens": 8, "optimizer.warmup-steps": 1,
        "optimizer.learning-rate": 0.03})
    go(*words, "--workdir", str(folder / "run"))
    return folder, words


@pytest.fixture(scope="module")
def models(made):
    """(the base, the run)."""
    return Generator.from_workdir(made[0] / "import"), Generator.from_workdir(made[0] / "run")


def shaken(run):
    """`run` with a tail that is trained far: every parameter of its own is moved."""
    trained, _ = split_params(run.params, run.config)
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    other = Generator(run.config, run.params, run.tokenizer)
    backbone = dict(run.params["backbone"])
    for name, leaves in moved["backbone"].items():
        backbone[name] = {key: leaf | leaves[key] if isinstance(leaf, dict) and key in leaves else leaves.get(key, leaf)
                          for key, leaf in backbone[name].items()}
    other.set_params(run.params | {"backbone": backbone})
    return other


def test_it_writes_what_the_model_writes_in_no_more_passes(models):
    base, run = models
    settings = dataclasses.replace(run.settings, max_new_tokens=40)
    greedy = Baselines(base).sample(PROMPTS, 40)
    for tail in (run, shaken(run)):
        for draft in ("tail", "both"):
            found = tail.generate(PROMPTS, dataclasses.replace(settings, draft=draft))
            assert [one.tokens for one in found] == [one.tokens for one in greedy]
            assert all(one.passes <= len(one.tokens) for one in found)


def test_it_writes_what_the_model_writes_with_repulsion(models):
    base, run = models
    want = base.generate(PROMPTS, dataclasses.replace(base.settings, repulsion=0.4, max_new_tokens=24))
    found = shaken(run).generate(PROMPTS, dataclasses.replace(run.settings, repulsion=0.4, max_new_tokens=24))
    assert [one.tokens for one in found] == [one.tokens for one in want]
    assert want[0].tokens != Baselines(base).sample(PROMPTS, 24)[0].tokens


def test_committed_positions_are_the_models_own_bit_for_bit_whatever_the_tail_has_learned(models):
    base, run = models
    ids = jax.random.randint(jax.random.key(3), (2, 20), 0, 280)
    z, positions = base.vocabulary.table[ids], jnp.broadcast_to(jnp.arange(20)[None], (2, 20))
    told = jnp.zeros((2, 20), jnp.int32)
    want, _ = make_forward(base.config)(base.backbone, z, jnp.ones((2, 20)), told, positions)
    for tail in (run, shaken(run)):
        maturity, slots = jnp.ones((2, 20)), jnp.arange(20) >= 15
        forward = make_forward(tail.config)
        np.testing.assert_array_equal(forward(tail.backbone, z, maturity, told + 4, positions)[0], want)
        maturity = jnp.where(slots[None, :], 0.5, maturity)
        mixed, _ = forward(tail.backbone, z, maturity, jnp.where(slots[None, :], 4, told), positions)
        np.testing.assert_array_equal(mixed[:, :15], want[:, :15])
        assert np.abs(mixed[:, 15:] - want[:, 15:]).min(-1).max() > 0


def test_the_model_is_not_trained(made, models):
    base, run = models
    for name, leaf in base.backbone["block_0"]["query"].items():
        np.testing.assert_array_equal(run.backbone["block_0"]["query"][name], leaf)
    np.testing.assert_array_equal(run.params["table"], base.params["table"])
    trained, frozen = split_params(run.params, run.config)
    assert set(trained) == {"backbone"}
    assert {name for name in trained["backbone"] if not name.startswith("block")} == {
        "slot_maturity", "slot_film", "slot_head"}
    assert np.any(trained["backbone"]["block_0"]["query"]["lora_b"])
    assert "lora_a" not in frozen["backbone"]["block_0"]["query"]
    stored = sum(file.stat().st_size for file in (made[0] / "run" / "checkpoints" / "3" / "params").rglob("*"))
    assert stored < sum(file.stat().st_size for file in (made[0] / "import" / "checkpoints").rglob("*"))


def test_only_slots_are_weighed_and_their_vectors_are_the_models_rows(models):
    _, run = models
    ids, keys = jax.random.randint(jax.random.key(3), (2, 48), 0, 280), objective.row_keys(jax.random.key(4), 2)
    _, tails = objective.run_with_tails(run.params, ids, keys, run.config, make_forward(run.config))
    weight = np.asarray(tails.weight).reshape(2, 3, 4)
    assert np.all(weight[:, :, 0] == 0)
    assert np.all(weight[:, :, 1:] == 1)
    sums = objective.loss_sums(run.params, ids, keys, losses.all_of(280), run.config, make_forward(run.config))[1]
    rows, radius = np.asarray(run.vocabulary.readout), run.config.table.radius
    z, target = np.asarray(tails.prediction), np.asarray(tails.target_ids)
    mse = np.sum((z - rows[target]) ** 2, axis=-1) / radius**2
    logits = 20.0 * (z / np.linalg.norm(z, axis=-1, keepdims=True)) @ rows.T / radius
    nce = np.log(np.sum(np.exp(logits), axis=-1)) - np.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sums["mse"], np.sum(tails.weight * mse), rtol=1e-4)
    np.testing.assert_allclose(sums["info_nce"], np.sum(tails.weight * nce), rtol=1e-3)
    np.testing.assert_allclose(sums["loss"], sums["mse"] + sums["info_nce"], rtol=1e-6)
    assert sums["weight"] == 2 * 3 * 3


def test_its_tail_can_be_watched(models):
    _, run = models
    moments = list(run.stream(PROMPTS[0]))
    assert [len(moment.tail) for moment in moments] == [4 - moment.committed for moment in moments]
    assert all(0 < alpha < 1 for alpha in moments[0].maturity)
    assert moments[-1].tokens == run.generate([PROMPTS[0]])[0].tokens


def test_what_a_tail_cannot_do_is_said(made, models, tmp_path):
    folder, words = made
    _, run = models
    with pytest.raises(UserError, match="never changes what that writes: commit must be 'verified', found 'front'"):
        run.generate(PROMPTS, dataclasses.replace(run.settings, commit="front"))
    with pytest.raises(UserError, match="whose weights act at slots alone and cannot be merged into it"):
        export_weights(folder / "run", tmp_path / "out")
    with pytest.raises(UserError, match="is a tail in front of a language model, whose text it never changes"):
        evaluate.load_pair(evaluate.Args(str(folder / "run"), str(folder / "import"), output=str(tmp_path)))
    with pytest.raises(UserError, match="found a tail run"):
        Baselines(run)
    for flag, value, said in (("--maturation.num-tails", "0", "objective.kind 'tail' needs maturation.num_tails"),
                              ("--maturation.max-maturity", "1.0", "a maturation.max_maturity below 1")):
        with pytest.raises(UserError, match=said):
            parse_config([*words, "--workdir", str(tmp_path), flag, value])
    with pytest.raises(UserError, match=r"objective.kind 'tail' needs a language model: give init_from"):
        parse_config(["--objective.kind", "tail"])


def test_a_tail_goes_in_front_of_a_language_model_only(made, runs_dir):
    _, words = made
    words = [*words]
    words[words.index("--init-from") + 1] = str(runs_dir / "run")
    with pytest.raises(UserError, match=r"is a run with a tail of its own; objective.kind 'tail' goes in front of a"):
        go(*words, "--workdir", str(made[0] / "other"))


def test_a_model_writes_texts_of_its_own_and_goes_on_where_it_was_stopped(runs_dir, tmp_path, capsys):
    flags = ["own", "--workdir", str(runs_dir / "ar"), "--drawn-tokens", "5", "--greedy-tokens", "6"]
    data.main([*flags, "--output", str(tmp_path / "whole.jsonl"), "--texts", "34"])
    assert "whole.jsonl: 34 texts" in capsys.readouterr().out
    whole = (tmp_path / "whole.jsonl").read_text()
    (tmp_path / "parted.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4])[:-2])  # killed while writing
    data.main([*flags, "--output", str(tmp_path / "parted.jsonl"), "--texts", "34"])
    assert (tmp_path / "parted.jsonl").read_text() == whole
    texts = [json.loads(line)["text"] for line in whole.splitlines()]
    assert len({*texts}) > 30
    with pytest.raises(UserError, match="--texts must be at least 1, found 0"):
        data.main([*flags, "--output", str(tmp_path / "none.jsonl"), "--texts", "0"])
    with pytest.raises(UserError, match=r"--output: cannot use .*gone"):
        data.main([*flags, "--output", str(tmp_path / "gone" / "own.jsonl")])


def test_a_run_that_has_begun_goes_on(made, models, tmp_path):
    folder, words = made
    shutil.copytree(folder / "run", tmp_path / "run")
    assert "resuming after step 3" in go(*words, "--workdir", str(tmp_path / "run"), "--train.num-steps", "4")
    gone_on = Generator.from_workdir(tmp_path / "run")
    chex.assert_trees_all_equal(gone_on.params["table"], models[0].params["table"])
    now, then = (run.params["backbone"]["slot_head"]["kernel"] for run in (gone_on, models[1]))
    assert np.any(now != then)


def test_our_own_baseline_takes_a_tail_too(runs_dir, tmp_path):
    words = runs.arguments(runs_dir, "front", "--objective.kind", "tail", "--init-from", str(runs_dir / "ar"),
                           "--maturation.num-tails", "2", "--maturation.max-tail-length", "4", "--adapter.rank", "1",
                           "--train.num-samples", "0", "--workdir", str(tmp_path / "run"), "--train.num-steps", "1")
    go(*words)
    base, run = Generator.from_workdir(runs_dir / "ar"), shaken(Generator.from_workdir(tmp_path / "run"))
    found = run.generate(PROMPTS, dataclasses.replace(run.settings, max_new_tokens=20))
    assert [one.tokens for one in found] == [one.tokens for one in Baselines(base).sample(PROMPTS, 20)]
    chex.assert_trees_all_equal(run.params["table"], base.params["table"])


@pytest.mark.parametrize("parts", [
    {"positions": "rotary", "rope": RopeConfig(partial=0.5, window_theta=50.0), "query_key_norm": True, "mlp": "geglu",
     "attention_window": 5, "windowed_layers": (0, 1), "norm": "rms_plus_one", "norm_placement": "around"},
    {"positions": "rotary", "num_kv_heads": 1, "norm": "rms", "mlp": "swiglu", "attention_bias": "qkv",
     "parallel_residual": True},
    {"mlp": "gelu_exact", "attention_scale": 0.3}])
def test_a_tail_goes_in_front_of_any_family(parts):
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    model = dataclasses.replace(tiny.CONFIG.model, num_layers=3, head="identity", **parts)
    plain = dataclasses.replace(
        tiny.CONFIG, model=model, table=TableConfig(geometry="raw"), objective=ObjectiveConfig("ar"))
    config = dataclasses.replace(
        plain, init_from="base", objective=ObjectiveConfig("tail"), adapter=AdapterConfig(rank=2),
        maturation=MaturationConfig(max_tail_length=4, num_tails=2),
        generation=GenerationConfig(tail_length=4, commit="verified", max_commit=4, max_new_tokens=16))
    params = init_params(jax.random.key(0), config, tokenizer.vocab_size)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [
        leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)])
    _, own = split_params(params, config)
    film = own["backbone"]["film"]["embed"]  # the model is told K = 0 only, the run of a baseline has rows for others
    rows = jnp.tile(film["embedding"], (plain.maturation.max_tail_length + 1, 1))
    own["backbone"]["film"] = {"embed": {"embedding": rows}}
    base, run = Generator(plain, own, tokenizer), Generator(config, params, tokenizer)
    found = run.generate(PROMPTS, run.settings)
    assert [one.tokens for one in found] == [one.tokens for one in Baselines(base).sample(PROMPTS, 16)]
    assert any(sum(one.accepted) for one in found)


def texts(run):
    settings = dataclasses.replace(run.settings, tail_length=3, max_new_tokens=8)
    return [(one.tokens, one.passes) for one in run.generate(PROMPTS, settings)]


def test_a_tail_goes_in_front_of_the_same_weights_elsewhere(made, models, tmp_path, capsys):
    folder, _ = made
    assert commands.main(["export", str(folder / "run"), str(tmp_path / "tail"), "--adapter"]) is None
    assert "in bfloat16, after 3 steps" in capsys.readouterr().out
    assert str(folder) not in (tmp_path / "tail" / "tail.json").read_text()
    import_weights(str(folder / "hf"), tmp_path / "import")  # by somebody else
    commands.main(["tail", str(tmp_path / "import"), str(tmp_path / "run"), "--source", str(tmp_path / "tail")])
    there = Generator.from_workdir(tmp_path / "run")
    assert [tokens for tokens, _ in texts(there)] == [tokens for tokens, _ in texts(models[1])]
    trained, _ = split_params(there.params, there.config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained["backbone"]["slot_head"]):
        mine = models[1].params["backbone"]["slot_head"][path[0].key]
        np.testing.assert_allclose(leaf, mine, rtol=2**-8)  # half a unit in the last of eight bits


def test_a_tail_is_recognised_by_the_weights_it_belongs_to(made, tmp_path, monkeypatch, capsys):
    folder, _ = made
    commands.main(["export", str(folder / "run"), str(tmp_path / "tails" / "its own"), "--adapter"])
    monkeypatch.setattr(tail_files, "SHIPPED", tmp_path / "tails")
    commands.main(["import", str(folder / "hf"), str(tmp_path / "import")])
    assert "a tail is shipped for it" in capsys.readouterr().out
    commands.main(["tail", str(tmp_path / "import"), str(tmp_path / "run")])
    assert Generator.from_workdir(tmp_path / "run").config.objective.kind == "tail"
    other = shutil.copytree(folder / "hf", tmp_path / "other")
    checkpoints.store(other, **{checkpoints.DOWN: 2 * checkpoints.weights()[checkpoints.DOWN]})
    commands.main(["import", str(other), str(tmp_path / "import of another")])
    assert "a tail is shipped" not in capsys.readouterr().out.split("import of another")[1]
    with pytest.raises(UserError, match="no tail is shipped for the model"):
        commands.main(["tail", str(tmp_path / "import of another"), str(tmp_path / "x")])
    with pytest.raises(UserError, match="belongs to another model"):
        commands.main(["tail", str(tmp_path / "import of another"), str(tmp_path / "x"),
                       "--source", str(tmp_path / "tails" / "its own")])
    with pytest.raises(UserError, match="a tail goes in front of a language model"):
        commands.main(["tail", str(tmp_path / "run"), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(("name", "change"), [
    ("tail.json", lambda content: b"{"), ("tail.json", lambda content: b"[]"), ("tail.json", lambda content: b"{}"),
    ("tail.safetensors", lambda content: content[:100]),
    ("tail.safetensors", lambda content: safetensors.numpy.save({"x": np.ones(3, np.float32)}))])
def test_a_damaged_tail_is_one_line(name, change, made, tmp_path):
    folder, _ = made
    commands.main(["export", str(folder / "run"), str(tmp_path / "tail"), "--adapter"])
    spoil(tmp_path / "tail", name, change)
    with pytest.raises(UserError, match="is damaged"):
        commands.main(["tail", str(folder / "import"), str(tmp_path / "x"), "--source", str(tmp_path / "tail")])
    assert not (tmp_path / "x").exists()


def test_what_trains_a_tail_is_chosen(made):
    folder, _ = made
    config = parse_config(["--init-from", str(folder / "import"), "--objective.kind", "tail", "--adapter.rank", "2",
                           "--maturation.num-tails", "3", "--maturation.max-tail-length", "4", "--data.seq-len", "48"])
    assert config.maturation.self_condition_prob == 0.7  # with embryos alone, slots hardly learn
    assert (config.generation.tail_length, config.generation.rate) == (4, 1.0)
