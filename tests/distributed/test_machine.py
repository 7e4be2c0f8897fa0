import dataclasses

import jax
import pytest

import tiny
from tokmat_jax.config import ClusterConfig, Config, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from tokmat_jax.distributed import mesh as sharding
from tokmat_jax.distributed import processes as machine
from tokmat_jax.errors import ConfigError, UserError
from tokmat_jax.training import throughput
from tokmat_jax.training.step import make_train_functions


@pytest.mark.parametrize(("fields", "mesh", "said"), [
    ({"train": TrainConfig(batch_size=6)}, MeshConfig(data=2, fsdp=2),
     r"batch_size / train.accumulation = 6 does not split over the 4 devices"),
    ({"train": TrainConfig(batch_size=8, accumulation=4)}, MeshConfig(data=4), "accumulation = 2 does not split"),
    ({}, MeshConfig(data=1, tensor=4), r"mesh.tensor = 4 must divide model.num_heads = 2"),
    ({"model": ModelConfig(embed_dim=16, num_heads=4, num_kv_heads=2)}, MeshConfig(data=1, tensor=4),
     "mesh.tensor = 4 must divide model.num_kv_heads = 2"),
    ({"model": ModelConfig(embed_dim=16, num_heads=4, mlp_dim=6)}, MeshConfig(data=1, tensor=4),
     "mesh.tensor = 4 must divide model.mlp_dim = 6"),
], ids=["batch", "micro-batch", "heads", "heads of keys", "hidden units"])
def test_a_config_that_does_not_suit_the_devices_is_refused(fields, mesh, said):
    config = dataclasses.replace(tiny.CONFIG, mesh=mesh, **fields)
    with pytest.raises(ConfigError, match=said):
        machine.check_fits(config, sharding.make_mesh(mesh))


def test_cudnn_is_refused_where_there_is_no_gpu_and_for_other_types():
    with pytest.raises(ConfigError, match=r"needs model.dtype 'bfloat16'.*found 'float32'"):
        dataclasses.replace(tiny.CONFIG, compute=dataclasses.replace(tiny.CONFIG.compute, attention="cudnn"))
    low = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, dtype="bfloat16"))
    near = dataclasses.replace(low.model, attention_window=8, windowed_layers=(0,))
    with pytest.raises(ConfigError, match=r"sees all positions, the layers \(0,\) have a window"):
        dataclasses.replace(low, model=near, compute=dataclasses.replace(low.compute, attention="cudnn"))
    config = dataclasses.replace(low, compute=dataclasses.replace(low.compute, attention="cudnn"))
    with pytest.raises(ConfigError, match="'cudnn' needs an NVIDIA GPU, found cpu"):
        machine.check_fits(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.parametrize(("fields", "said"), [
    ({"kind": "manual", "coordinator": "host:1"}, "all three of them"),
    ({"coordinator": "host:1", "num_processes": 2, "process_index": 0}, "found kind 'none'"),
    ({"kind": "manual", "coordinator": "host:1", "num_processes": 2, "process_index": 2}, r"must lie in 0..1"),
    ({"kind": "manual", "coordinator": "host", "num_processes": 2, "process_index": 0}, "must be HOST:PORT"),
    ({"kind": "manual", "coordinator": "host:99999", "num_processes": 2, "process_index": 0}, "must be HOST:PORT"),
], ids=str)
def test_a_cluster_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ClusterConfig(**fields)


def test_a_cluster_that_nothing_announces_is_refused():
    with pytest.raises(UserError, match=r"'auto': no cluster to join .*name it with --cluster.kind manual"):
        machine.join_cluster(ClusterConfig(kind="auto"))


def test_alone_the_first_process_does_the_work():
    assert machine.is_first()
    assert machine.on_first(lambda: 7) == 7
    with pytest.raises(UserError, match="no"):
        machine.on_first(lambda: (_ for _ in ()).throw(UserError("no")))


def test_operations_by_hand():
    # d 4, one block of two heads of 2, MLP of 16: attention 4 · 16, MLP 2 · 64, conditioning 2 · 16, head 16, and three
    # negatives.
    model = ModelConfig(embed_dim=4, num_layers=1, num_heads=2)
    config = dataclasses.replace(tiny.CONFIG, model=model, objective=ObjectiveConfig(num_negatives=3))
    assert throughput.matrix_weights(config, 100) == 64 + 128 + 32 + 16 + 12
    assert throughput.flops_per_token(config, 100) == 6 * 252 + 12 * 4 * 49 / 2
    baseline = dataclasses.replace(config, objective=ObjectiveConfig(kind="ar"))
    assert throughput.matrix_weights(baseline, 100) == 240 + 400
    own = dataclasses.replace(config, maturation=dataclasses.replace(config.maturation, self_condition_prob=0.5))
    assert throughput.flops_per_token(own, 100) == pytest.approx(4 / 3 * throughput.flops_per_token(config, 100))
    # Two tails of six slots beside a window of 48: a quarter of its positions, run forward, back and once before.
    many = dataclasses.replace(own, maturation=dataclasses.replace(own.maturation, num_tails=2, max_tail_length=6))
    whole = throughput.flops_per_token(config, 100)
    assert throughput.flops_per_token(many, 100) == pytest.approx(whole * (1 + 4 / 3 / 4))
    front = dataclasses.replace(many, init_from="base", objective=ObjectiveConfig("tail", num_negatives=3))
    assert throughput.flops_per_token(front, 100) == pytest.approx(whole * (1 / 3 + 1 / 4))


def compilers_count(config, vocab_size):
    """Operations of a compiled step per token, as XLA counts them; a loop counts once, so there must be none."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        functions = make_train_functions(config, vocab_size, mesh)
        shape = (config.train.batch_size, config.data.seq_len)
        analysis = functions.step.lower(
            functions.shapes, jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct((vocab_size,), "float32")
        ).compile().cost_analysis()
    assert isinstance(analysis, dict)
    return analysis["flops"] / (shape[0] * shape[1])


@pytest.mark.parametrize("kind", ["maturation", "ar"])
def test_the_formula_is_near_the_compilers_own_count(kind):
    config = Config(
        data=dataclasses.replace(tiny.CONFIG.data, seq_len=128), train=TrainConfig(batch_size=8),
        model=ModelConfig(embed_dim=128, num_layers=1, num_heads=2), objective=ObjectiveConfig(kind=kind),
        compute=dataclasses.replace(tiny.CONFIG.compute, remat="none"), mesh=MeshConfig(data=1),
    )
    # Softmax, norms, GELU and the update of 0.8 million weights over 1,024 tokens come on top, a third at this size.
    ratio = compilers_count(config, 1024) / throughput.flops_per_token(config, 1024)
    assert 0.9 < ratio < 1.4


@pytest.mark.parametrize(("kind", "dtype", "peak"), [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 9.89e14), ("NVIDIA H100 PCIe", "bfloat16", 7.56e14),
    ("NVIDIA H200", "bfloat16", 9.89e14), ("NVIDIA A100-SXM4-40GB", "bfloat16", 3.12e14),
    ("TPU v4", "bfloat16", 2.75e14),
    ("TPU v5 lite", "bfloat16", 1.97e14), ("TPU v5", "bfloat16", 4.59e14), ("TPU v5p", "bfloat16", 4.59e14),
    ("TPU v6 lite", "bfloat16", 9.18e14), ("NVIDIA L40S", "bfloat16", 3.62e14), ("NVIDIA L4", "bfloat16", 1.21e14),
    ("NVIDIA L40", "bfloat16", None), ("TPU v4 lite", "bfloat16", None), ("cpu", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3", "float32", None), ("Radeon", "bfloat16", None),
])
def test_an_unknown_peak_is_none(kind, dtype, peak):
    assert throughput.peak_flops(kind, dtype) == peak


def test_measures_by_hand(monkeypatch):
    config = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.CONFIG.model, dtype="bfloat16"))
    monkeypatch.setattr(throughput, "peak_flops", lambda kind, dtype: 1e9)
    found = throughput.measures(config, 61, 2.0)
    assert found["tokens_per_second"] == 2 * 4 * 48
    assert found["step_seconds"] == 0.5
    assert found["mfu"] == pytest.approx(384 * throughput.flops_per_token(config, 61) / 1e9 / 4)
    monkeypatch.undo()
    assert "mfu" not in throughput.measures(config, 61, 2.0)
    assert 0 < throughput.memory()["host_memory_gb"] < 100


def test_compiled_programs_are_kept_where_the_config_says_unless_the_environment_does(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    config = dataclasses.replace(tiny.CONFIG.compute, compilation_cache=str(tmp_path))
    machine.use_compilation_cache(config)
    assert told == {}  # the tests have chosen a folder
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    machine.use_compilation_cache(dataclasses.replace(config, compilation_cache=None))
    assert told == {}
    machine.use_compilation_cache(config)
    assert told["jax_compilation_cache_dir"] == str(tmp_path)
