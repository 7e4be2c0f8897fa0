"""The environment of a process: its cluster, its compilation cache, and whether a config fits its devices."""

import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from tokmat_jax.config import ClusterConfig, ComputeConfig, Config
from tokmat_jax.distributed.mesh import BATCH_AXES
from tokmat_jax.errors import ConfigError, UserError, one_line
from tokmat_jax.keys import SETTINGS

T = TypeVar("T")

_SETTINGS = SETTINGS | {"jax_numpy_dtype_promotion": "standard", "jax_transfer_guard_host_to_device": None,
                        "jax_transfer_guard_device_to_device": None, "jax_transfer_guard_device_to_host": None,
                        "jax_transfer_guard": None}
"""JAX settings that a script does not take from the environment: other values would end it or change its numbers."""

LOST = 3
"""Exit code of a process whose cluster has broken; the same command on all processes resumes the run."""


def settle_jax() -> None:
    """Sets `_SETTINGS`, and reports on standard error which of them the environment had changed."""
    for name, value in _SETTINGS.items():
        if (found := getattr(jax.config, name)) != value:
            jax.config.update(name, value)
            print(f"note: {name.upper()}={found} is ignored ({value} is used): it would change the numbers or end the "
                  f"run", file=sys.stderr)


def join_cluster(config: ClusterConfig) -> None:
    """Connects the processes of a run; call it before anything asks for a device. Raises UserError if that fails."""
    if config.kind == "none":
        return
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_index)
    except (RuntimeError, ValueError) as error:
        hint = ": name it with --cluster.kind manual" if config.kind == "auto" else ""
        raise UserError(f"cluster.kind {config.kind!r}: no cluster to join ({one_line(error)}){hint}") from None


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def on_first(work: Callable[[], T]) -> T | None:
    """Runs `work` in process 0 while the others wait; in the others, the result is None.

    If it raises UserError or OSError, every process stops with a UserError.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    result, failure = None, None
    if is_first():
        try:
            result = work()
        except UserError as error:
            failure = error
        except OSError as error:
            failure = UserError(one_line(error))
    if not multihost_utils.broadcast_one_to_all(np.int32(failure is None)):
        raise failure or UserError("stopped, because process 0 has: see its message")
    return result


def everywhere(fine: bool) -> bool:
    """Whether `fine` is true in all processes; every process must call this."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(fine)).all())


def leave_broken_cluster(what: str) -> NoReturn:
    """Ends a process that can no longer continue with the others; a clean exit would wait for them."""
    print(f"error: process {jax.process_index()} {what}: run the same command again in all processes to resume from "
          f"the newest checkpoint", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


def use_compilation_cache(config: ComputeConfig) -> None:
    """Keeps compiled programs in `config.compilation_cache`, unless the environment has chosen a folder."""
    if config.compilation_cache is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(config.compilation_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError, before anything is compiled, if `mesh` or the devices do not fit `config`."""
    micro_batch = config.train.batch_size // config.train.accumulation
    rows, tensor = math.prod(mesh.shape[axis] for axis in BATCH_AXES), mesh.shape["tensor"]
    if micro_batch % rows:
        raise ConfigError(f"train.batch_size / train.accumulation = {micro_batch} does not split over the {rows} "
                          f"devices of data × fsdp")
    for name, size in (("num_heads", config.model.num_heads), ("num_kv_heads", config.model.kv_heads),
                       ("mlp_dim", config.model.mlp_size)):
        if size % tensor:
            raise ConfigError(f"mesh.tensor = {tensor} must divide model.{name} = {size}")
    if config.compute.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(f"compute.attention 'cudnn' needs an NVIDIA GPU, found {jax.devices()[0].device_kind}: leave "
                          f"it out")
