"""Every setting and its default: frozen, nested dataclasses, checked when they are created.

A file in `configs/` returns one `Config`; the command line overrides single fields (`--model.num-layers 4`). Symbols in
the docstrings are those of the paper.
"""

from tokmat_jax.config.generation import Commit, Draft, GenerationConfig, SteeringSchedule
from tokmat_jax.config.machine import AttentionKernel, ClusterConfig, ComputeConfig, MeshConfig, Remat
from tokmat_jax.config.model import ModelConfig, RopeConfig, TableConfig
from tokmat_jax.config.run import Config
from tokmat_jax.config.text import DataConfig, TokenizerConfig
from tokmat_jax.config.training import (
    AdapterConfig,
    MaturationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Profile,
    TrainConfig,
)

__all__ = [
    "AdapterConfig", "AttentionKernel", "ClusterConfig", "Commit", "ComputeConfig", "Config", "DataConfig", "Draft",
    "GenerationConfig", "MaturationConfig", "MeshConfig", "ModelConfig", "ObjectiveConfig", "OptimizerConfig",
    "Profile", "Remat", "RopeConfig", "SteeringSchedule", "TableConfig", "TokenizerConfig", "TrainConfig",
]
