"""Runs with an adapter: what is trained, what stays, what is stored, and what it becomes."""

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
from tokmat_jax.config import AdapterConfig, MaturationConfig
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import export_weights, import_weights
from tokmat_jax.hf.peft import export_adapter
from tokmat_jax.method import losses
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.lora import dropout_keys, fold_adapter, join_params, split_params
from tokmat_jax.model.params import param_shapes
from tokmat_jax.storage.model import load_model
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.training import objective
from tokmat_jax.training.step import eval_sums

IDS = jax.random.randint(jax.random.key(7), (4, 48), 0, tiny.VOCAB)
KEYS = objective.row_keys(jax.random.key(8), 4)


def adapted(**fields):
    """The tiny config with an adapter; init_from is only named."""
    return dataclasses.replace(tiny.CONFIG, init_from="base", adapter=AdapterConfig(**{"rank": 3} | fields))


def predicted(params, config, **more):
    return objective.run_windows(params, IDS, KEYS, config, make_forward(config), **more).prediction


def test_an_adapter_folded_into_its_matrices_computes_the_same():
    config = adapted(matrices=("query", "mlp_out"), scale=0.7)
    params = tiny.shaken_params(config)
    plain, without = fold_adapter(params, config)
    assert without == dataclasses.replace(config, adapter=AdapterConfig())
    assert "lora_a" in params["backbone"]["blocks"]["query"]
    assert "lora_a" not in params["backbone"]["blocks"]["key"]
    assert jax.tree.structure(plain) == jax.tree.structure(param_shapes(tiny.CONFIG, tiny.VOCAB))
    now, then = predicted(params, config), predicted(plain, without)
    np.testing.assert_allclose(now, then, atol=1e-4)  # float32 sums in another order
    trained, _ = split_params(params, config)
    off = join_params(params, jax.tree.map(jnp.zeros_like, {"backbone": {"blocks": trained["backbone"]["blocks"]}}))
    assert np.abs(predicted(off, config) - then).max() > 1e-2


def test_of_full_rank_its_gradient_is_that_of_the_matrix():
    config = adapted(rank=16, scale=1.0, matrices=("query",))
    params = tiny.shaken_params(config)
    query = params["backbone"]["blocks"]["query"]
    query["lora_a"], query["lora_b"] = jnp.broadcast_to(jnp.eye(16), (2, 16, 16)), jnp.zeros((2, 16, 16))
    full = fold_adapter(params, config)[0]

    def gradient(params, config):
        def loss(params):
            return objective.loss_sums(params, IDS, KEYS, losses.all_of(tiny.VOCAB), config, make_forward(config))[0]

        return jax.grad(loss)(params)["backbone"]["blocks"]["query"]

    chex.assert_trees_all_close(gradient(params, config)["lora_b"], gradient(full, tiny.CONFIG)["kernel"], rtol=1e-4,
                                atol=1e-4)


def test_dropout_of_a_row_depends_on_its_key_alone():
    config = adapted(dropout=0.5)
    params, order = tiny.shaken_params(config), jnp.array([2, 0, 3, 1])
    forward = make_forward(config)

    def run(ids, keys, dropped):
        z = jnp.take(params["table"], ids, axis=0)
        more = {"dropout": dropout_keys(keys, config)} if dropped else {}
        positions = jnp.broadcast_to(jnp.arange(48)[None], ids.shape)
        return np.asarray(forward(params["backbone"], z, jnp.ones(ids.shape), jnp.zeros(len(ids), jnp.int32), positions,
                                  **more)[0])

    one = run(IDS, KEYS, True)
    np.testing.assert_allclose(run(IDS[order], KEYS[order], True), one[order], atol=1e-6)
    assert np.abs(one - run(IDS, KEYS, False)).max() > 1e-2
    assert np.abs(one - run(IDS, KEYS[order], True)).max() > 1e-2
    assert dropout_keys(KEYS, adapted()) is None


def test_every_tail_of_a_window_drops_inputs_of_its_own():
    settings = MaturationConfig(max_tail_length=4, num_tails=2, history_dropout=0.0)
    config = dataclasses.replace(adapted(dropout=0.5), maturation=settings)
    params = tiny.shaken_params(config)

    def tails(config, keys=KEYS):
        return objective.run_with_tails(params, IDS, keys, config, make_forward(config))[1].prediction

    dropped, order = tails(config), jnp.array([2, 0, 3, 1])
    assert np.abs(dropped - tails(dataclasses.replace(config, adapter=AdapterConfig(rank=3)))).max() > 1e-2
    swapped = objective.run_with_tails(params, IDS[order], KEYS[order], config, make_forward(config))[1].prediction
    np.testing.assert_allclose(swapped, dropped[order], atol=1e-5)


def test_validation_drops_nothing():
    unigram = jnp.ones(tiny.VOCAB) / tiny.VOCAB
    params = tiny.shaken_params(adapted())
    with jax.numpy_dtype_promotion("standard"):
        found = [eval_sums(params, IDS, unigram, jnp.int32(0), adapted(dropout=share)) for share in (0.0, 0.5)]
    chex.assert_trees_all_equal(*found)


def test_what_is_trained_and_what_is_frozen_are_the_whole():
    config = adapted(rank=0)
    params = tiny.shaken_params(config)
    trained, frozen = split_params(params, config)
    assert set(trained["backbone"]) == {"maturity", "film", "head"}
    assert set(trained) == {"backbone"}
    chex.assert_trees_all_equal(join_params(frozen, trained), params)
    assert split_params(params, tiny.CONFIG) == (params, {})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the `import` of a tiny Llama and a `run` of four steps with an adapter; its flags and output."""
    folder = tmp_path_factory.mktemp("adapter")
    words = runs.imported(folder, **{"train.eval-batches": 1, "adapter.rank": 2, "adapter.dropout": 0.2,
                                     "objective.negatives": "uniform", "train.checkpoint-every": 2})
    return folder, words, go(*words, "--workdir", str(folder / "run"), "--train.num-steps", "4")


def whole(workdir):
    config = load_config(workdir)
    size = Generator.from_workdir(workdir).vocabulary.table.shape[0]
    return load_model(workdir, config, size, jax.sharding.SingleDeviceSharding(jax.devices()[0]))[0]


def test_the_base_stays_bit_for_bit_and_only_what_was_added_is_stored(llama):
    folder, _, printed = llama
    base, now = whole(folder / "import"), whole(folder / "run")
    trained, frozen = split_params(now, load_config(folder / "run"))
    for name in ("query", "mlp_gate", "mlp_out", "attention_norm"):
        chex.assert_trees_all_equal(
            {key: leaf for key, leaf in now["backbone"]["blocks"][name].items() if "lora" not in key},
            base["backbone"]["blocks"][name])
    np.testing.assert_array_equal(now["table"], base["table"])
    assert np.any(now["backbone"]["blocks"]["query"]["lora_b"])
    size, stored = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (now, trained))
    assert f"{size:,} parameters, of which {stored:,} are trained" in printed
    assert jax.tree.leaves(frozen)
    own = sum(file.stat().st_size for file in (folder / "run" / "checkpoints" / "4" / "params").rglob("*"))
    of_base = sum(file.stat().st_size for file in (folder / "import" / "checkpoints").rglob("*"))
    assert own < of_base


def test_a_resumed_run_is_that_which_never_stopped(llama):
    folder, words, _ = llama
    shutil.copytree(folder / "run", folder / "parted")
    shutil.rmtree(folder / "parted" / "checkpoints" / "4")
    assert "resuming after step 2" in go(*words, "--workdir", str(folder / "parted"), "--train.num-steps", "4")
    chex.assert_trees_all_equal(whole(folder / "parted"), whole(folder / "run"))


def test_it_is_exported_as_one_model_and_comes_back(llama, tmp_path):
    folder, _, _ = llama
    run = Generator.from_workdir(folder / "run")
    export_weights(folder / "run", tmp_path / "out")
    import_weights(str(tmp_path / "out"), tmp_path / "back")
    back = Generator.from_workdir(tmp_path / "back")
    assert not run.config.adapter.rank
    assert "lora_a" not in run.backbone["block_0"]["query"]
    ids = list(range(3, 20))
    assert back.next_tokens(ids) == run.next_tokens(ids)
    plain = jax.tree.map(np.asarray, run.params["backbone"]["block_0"]["query"]["kernel"])
    np.testing.assert_array_equal(back.params["backbone"]["block_0"]["query"]["kernel"], plain)


def test_its_adapter_alone_is_written_as_peft_reads_it(llama, tmp_path):
    """PEFT computes x Wᵀ + (alpha / r) · x Aᵀ Bᵀ with A [r, in] and B [out, r]; that is the merged matrix."""
    folder, _, _ = llama
    export_adapter(folder / "run", tmp_path / "peft")
    export_weights(folder / "run", tmp_path / "merged")
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 2, 4.0)
    assert said["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    stored = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    merged = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    for name in (checkpoints.QUERY, checkpoints.DOWN):
        low, high = (stored[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"] for part in "AB")
        want = checkpoints.weights()[name] + said["lora_alpha"] / said["r"] * high @ low
        np.testing.assert_allclose(merged[name], want, atol=1e-6)
    assert len(stored) == 14
    with pytest.raises(UserError, match="has no low-rank adapter"):
        export_adapter(folder / "import", tmp_path / "other")


def test_an_adapter_without_its_base_says_which_and_where(llama, tmp_path):
    folder, words, _ = llama
    shutil.copytree(folder / "import", tmp_path / "import")
    words[words.index("--init-from") + 1] = str(tmp_path / "import")
    go(*words, "--workdir", str(tmp_path / "run"), "--train.num-steps", "1")
    words[words.index("--init-from") + 1] = str(folder / "import")
    shutil.rmtree(tmp_path / "import")
    with pytest.raises(UserError, match=f"adapter of the model in {tmp_path / 'import'}, which is gone"):
        Generator.from_workdir(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    checkpoints.write(tmp_path / "hf")
    checkpoints.store(tmp_path / "hf", **{checkpoints.QUERY: np.ones((8, 8), np.float32)})
    import_weights(str(tmp_path / "hf"), tmp_path / "import")
    with pytest.raises(UserError, match=r"adapter of another model than the one in .*import: its fingerprint is"):
        Generator.from_workdir(tmp_path / "run")


@pytest.mark.parametrize(("fields", "said"), [
    ({"rank": -1}, "adapter.rank must not be negative, found -1"),
    ({"rank": 17}, r"adapter.rank must not exceed model.embed_dim \(16\), the full rank, found 17"),
    ({"matrices": ("query", "values")}, r"adapter.matrices: a block has query, .*, found \['values'\]"),
    ({"matrices": ()}, "adapter.rank needs adapter.matrices to adapt, found none"),
])
def test_an_adapter_that_cannot_be_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        adapted(**fields)


def test_a_matrix_that_a_model_does_not_have_is_nothing_to_adapt():
    with pytest.raises(UserError, match="this model's blocks have no mlp_gate, so that there is nothing to adapt"):
        adapted(matrices=("mlp_gate",))


def test_an_adapter_needs_a_model_to_adapt():
    with pytest.raises(UserError, match=r"adapter.rank 3 needs a model to adapt: give init_from"):
        dataclasses.replace(tiny.CONFIG, adapter=AdapterConfig(rank=3))
