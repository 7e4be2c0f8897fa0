"""Run by test_train_step.py in a process with eight devices: a step under every kind of mesh against one device's."""

import dataclasses
import json
import sys

import jax
import numpy as np

import tiny
from tokmat_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from tokmat_jax.distributed import mesh as sharding
from tokmat_jax.training.step import make_train_functions

MESHES = [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=4, tensor=2), MeshConfig(data=1, tensor=8),
          MeshConfig(data=2, fsdp=2, tensor=2)]


def two_steps(config, devices):
    """First moments and losses of two updates, the shards of a kernel, and how often the step was compiled."""
    ids = np.asarray(jax.random.randint(jax.random.key(7), (8, 48), 0, tiny.VOCAB), np.int32)
    unigram = np.full(tiny.VOCAB, 1 / tiny.VOCAB, np.float32)
    mesh = sharding.make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, tiny.VOCAB, mesh)
        state, losses = functions.init(jax.random.key(0)), []
        for _ in range(2):
            state, metrics = functions.step(state, sharding.put_rows(ids, slice(0, 8), 8, mesh), unigram)
            losses.append(float(metrics["loss"]))
        kernel = state.params["backbone"]["blocks"]["mlp_in"]["kernel"]
        return jax.device_get(state.opt_state[1][0].mu), losses, kernel.addressable_shards[0].data.shape, \
            functions.step._cache_size()


def main(kind):
    model = dataclasses.replace(tiny.CONFIG.model, num_heads=8)
    base = dataclasses.replace(
        tiny.CONFIG, model=model, objective=ObjectiveConfig(kind=kind), mesh=MeshConfig(data=1),
        train=dataclasses.replace(tiny.CONFIG.train, batch_size=8), optimizer=OptimizerConfig(warmup_steps=0))
    one, losses, *_ = two_steps(base, jax.devices()[:1])
    found = []
    for mesh in MESHES:
        moments, own, shard, compiled = two_steps(dataclasses.replace(base, mesh=mesh), jax.devices())
        apart = max(float(np.max(np.abs(a - b))) for a, b in
                    zip(jax.tree.leaves(one), jax.tree.leaves(moments), strict=True))
        found.append({"mesh": dataclasses.asdict(mesh), "apart": apart, "shard": shard, "compiled": compiled,
                      "losses": [own, losses]})
    print(json.dumps(found))


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"):
        main(sys.argv[1])
