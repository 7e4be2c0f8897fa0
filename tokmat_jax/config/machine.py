"""Settings of the machine; none of them changes what a run computes."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tokmat_jax.config.checks import Section, require

AttentionKernel = Literal["xla", "cudnn"]
Remat = Literal["none", "products", "blocks"]


@dataclass(frozen=True)
class MeshConfig(Section, name="mesh"):
    """Devices per axis. The product must be the number of devices; -1 takes the devices that are left."""

    data: int = -1
    """Replicas: the batch is split, the parameters are copied."""
    fsdp: int = 1
    """The batch and the parameters are split."""
    tensor: int = 1
    """Matrices are split by heads and hidden units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        require(all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
                f"mesh sizes must be positive, at most one of them -1, found {sizes}")


@dataclass(frozen=True)
class ComputeConfig(Section, name="compute"):
    """How the numbers are computed on a machine; none of this changes what a run computes."""

    attention: AttentionKernel = "xla"
    """Kernel of causal attention in training; `cudnn` is flash attention on NVIDIA GPUs and requires bfloat16."""
    remat: Remat = "products"
    """What the backward pass recomputes instead of storing it: nothing, everything but the results of matrix products,
    or whole blocks (least memory, a third more work)."""
    compilation_cache: str | None = "runs/compiled"
    """Folder that keeps compiled programs for the next process (the variable JAX_COMPILATION_CACHE_DIR takes
    precedence); None keeps none."""


@dataclass(frozen=True)
class ClusterConfig(Section, name="cluster"):
    """The processes of a run, usually one per host; all must see the same file system."""

    kind: Literal["none", "auto", "manual"] = "none"
    """`none`: one process; `auto`: JAX detects TPU pods, Slurm, Open MPI and Kubernetes; `manual`: the three fields
    below."""
    coordinator: str | None = None
    """`host:port` of process 0."""
    num_processes: int | None = None
    """Number of processes."""
    process_index: int | None = None
    """Index of this process, from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.coordinator, self.num_processes, self.process_index)
        require((None not in given) if self.kind == "manual" else given == (None, None, None),
                f"cluster.coordinator, cluster.num_processes and cluster.process_index go with cluster.kind 'manual', "
                f"all three of them, found kind {self.kind!r} and {given}")
        if self.num_processes is not None and self.process_index is not None:
            require(0 <= self.process_index < self.num_processes,
                    f"cluster.process_index must lie in 0..{self.num_processes - 1} (cluster.num_processes "
                    f"{self.num_processes}), found {self.process_index}")
        host, _, port = (self.coordinator or "h:1").rpartition(":")
        require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
                f"cluster.coordinator must be HOST:PORT, found {self.coordinator!r}")
