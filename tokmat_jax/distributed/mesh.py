"""Where arrays live: one mesh of axes `data`, `fsdp` and `tensor`, and an ordered list of path rules.

The first rule whose pattern is found in a parameter's path applies. An axis that does not divide its dimension
is dropped. One device is a mesh too, not a special case.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tokmat_jax.config import MeshConfig
from tokmat_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)(table|readout)$", PartitionSpec("tensor", "fsdp")),
    (r"blocks/(query|key|value|mlp_in|mlp_gate)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/(attention_out|mlp_out)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/(query|key|value|mlp_in|mlp_gate)/bias", PartitionSpec(None, "tensor")),
    (r"(kernel|embedding)$", PartitionSpec("fsdp")),
    (r"", PartitionSpec()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config` asks for; raises ConfigError if the devices do not fit it."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ConfigError(f"mesh data × fsdp × tensor = {config.data} × {config.fsdp} × {config.tensor} "
                          f"does not fit {len(devices)} device(s): the product must be their number")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/query/kernel` from a JAX key path."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def place(shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `shapes` (arrays or ShapeDtypeStructs), by `RULES`.

    An optimiser's moments end in the path of their parameter, so one call places a whole training state.
    """

    def sharding(path, leaf):
        name = path_name(path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        axes = [axis if axis and leaf.shape[i] % mesh.shape[axis] == 0 else None
                for i, axis in enumerate(spec[: leaf.ndim])]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch [B, …] over the axes `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch from the first to the last that this process's devices hold, gaps included."""
    held = [index[0] for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values() if index]
    return slice(min(rows.start or 0 for rows in held),
                 max(batch_size if rows.stop is None else rows.stop for rows in held))


def put_rows(local: np.ndarray, rows: slice, batch_size: int, mesh: Mesh) -> jax.Array:
    """The global batch [batch_size, …]; this process supplies its `rows` of it as `local`."""
    def held(index):
        begin, stop, _ = index[0].indices(batch_size)
        return local[begin - rows.start : stop - rows.start]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), batch_sharding(mesh), held)


def put_whole(value: np.ndarray, mesh: Mesh) -> jax.Array:
    """`value` copied to every device; it must be the same in every process."""
    return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy per device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards() -> int:
    """Number of parts into which the current mesh splits the rows of a batch; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def spread(batch: Any, devices: Sequence[Any]) -> Any:
    """The arrays of a decoder's `batch` [B, …], with rows split over `devices` if their number divides B."""
    leaves = jax.tree.leaves(batch)
    if len(devices) == 1 or leaves[0].shape[0] % len(devices):
        return batch
    return jax.device_put(batch, batch_sharding(make_mesh(MeshConfig(), devices)))


def constrain_activations(h: jax.Array) -> jax.Array:
    """Keeps `h` [B, …] split over the batch axes; does nothing outside a mesh or if they do not divide B."""
    if jax.sharding.get_abstract_mesh().empty or h.shape[0] % batch_shards():
        return h
    return jax.lax.with_sharding_constraint(h, PartitionSpec(BATCH_AXES))
