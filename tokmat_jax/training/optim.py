"""Schedules and optimisers, all from optax."""

import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from tokmat_jax.config import OptimizerConfig
from tokmat_jax.distributed.mesh import path_name


def make_schedule(config: OptimizerConfig, peak: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then `config.schedule` down to `final_share` of it at `num_steps`."""
    warmup = min(config.warmup_steps, num_steps)
    rest = max(num_steps - warmup, 1)
    final = peak * config.final_share
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_share),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup])


def _map_names(params: Any, pattern: str, yes: Any, no: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: yes if re.search(pattern, path_name(path)) else no, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon on the blocks' matrices with AdamW on the rest.

    The blocks' kernels are [L, in, out]: Muon orthogonalises the matrix of each layer separately.
    """
    schedule = make_schedule(config, config.learning_rate, num_steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay,
            mask=lambda params: _map_names(params, r"kernel$", True, False),
        )
    else:
        update = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, num_steps),
            weight_decay=config.weight_decay, adam_b1=config.beta1, adam_b2=config.beta2, adam_learning_rate=schedule,
            muon_weight_dimension_numbers=lambda params: _map_names(
                params, r"blocks/.*kernel$", MuonDimensionNumbers(reduction_axis=1, output_axis=2), None
            ),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
