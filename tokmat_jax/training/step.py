"""The training state, sharded from the start, and its two jitted functions: one update, one validation batch."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tokmat_jax.config import Config
from tokmat_jax.distributed.mesh import batch_sharding, place, replicated
from tokmat_jax.keys import seed_key
from tokmat_jax.method import losses
from tokmat_jax.method.table import rank_and_entropy
from tokmat_jax.model.backbone import Params, make_forward
from tokmat_jax.model.lora import join_params, split_params
from tokmat_jax.model.params import TrainState, init_params, keep_logit_scale_in_range, logit_scale_of
from tokmat_jax.training import objective
from tokmat_jax.training.optim import make_optimizer, make_schedule

MATURITY_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Lower edges of the bins for which accuracy is reported; the last bin has only maturity 1."""

_EVAL = 2**32 - 1
"""Folded into the seed for validation, so that no training step has the same noise."""


@dataclasses.dataclass(frozen=True)
class TrainFunctions:
    """The compiled functions of a run; `make_train_functions` builds them."""

    init: Callable[..., TrainState]
    """(key, table or None) → a fresh TrainState on the mesh."""
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """(state, ids [B, T], unigram [V]) → (next state, metrics); the given state is donated."""
    evaluate: Callable[..., dict[str, jax.Array]]
    """(params, ids [B, T], unigram [V], index [] of the batch) → sums [] by name, see `eval_sums`."""
    shapes: TrainState
    """The state as ShapeDtypeStructs with their shardings."""


def update(
    state: TrainState, ids: jax.Array, unigram: jax.Array, config: Config, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on `ids` [B, T]: the gradient of Σ w L / Σ w over the whole batch, for any accumulation.

    If the loss, its gradient or the new parameters are not finite, the update is `skipped`: only the step advances,
    and the optimiser's own count of updates does not.
    """
    forward = make_forward(config)
    step_key = jax.random.fold_in(seed_key(config.train.seed), state.step)
    negatives_key, rows_key = jax.random.split(step_key)
    negatives = losses.draw_negatives(negatives_key, config.objective, ids[:, 1:], unigram)
    keys = objective.row_keys(rows_key, ids.shape[0])

    def loss(params, ids, keys):
        whole = join_params(state.frozen, params)
        return objective.loss_sums(whole, ids, keys, negatives, config, forward)

    def gradient(ids, keys):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(state.params, ids, keys)
        return grads, sums

    if config.train.accumulation == 1:
        grads, sums = gradient(ids, keys)
    else:
        grads, sums = _accumulate(gradient, ids, keys, config.train.accumulation)
    grads = jax.tree.map(lambda g: g / sums["weight"], grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = keep_logit_scale_in_range(optax.apply_updates(state.params, updates))
    metrics = {name: total / sums["weight"] for name, total in sums.items() if name != "weight"}
    grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(params)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
    kept = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state), kept)
    schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, config.train.num_steps)
    metrics |= {
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
        "learning_rate": schedule(state.step),
        "logit_scale": logit_scale_of(state.whole, config),
    }
    return TrainState(state.step + 1, params, opt_state, state.frozen), metrics


def _accumulate(gradient: Callable, ids: jax.Array, keys: jax.Array, parts: int):
    """Sums `gradient` over `parts` micro-batches; each takes every parts-th row, so that no device is idle."""

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, gradient(*micro)), None

    micro_batches = (split(ids), split(keys))
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, *first))
    return jax.lax.scan(add, zero, micro_batches)[0]


def eval_sums(
    params: Params, ids: jax.Array, unigram: jax.Array, index: jax.Array, config: Config
) -> dict[str, jax.Array]:
    """Sums over one validation batch [B, T]; `eval_means` turns their totals into metrics.

    Tails are drawn as in training, but without history dropout, and no input of an adapter is dropped; of many tails,
    all hold the model's own vectors, and a single tail never does. The loss terms are weighted as in training. `top1`,
    `top5` (the target is the nearest token to ẑ, among the five nearest) and `entropy` (softmax(cos(ẑ, E)), τ = 1,
    nats) are unweighted sums over positions, by maturity of the target; `top1` of many tails also by slot.
    """
    settings = config.maturation
    many = config.objective.kind != "ar" and settings.num_tails > 0
    plain = dataclasses.replace(settings, history_dropout=0.0, self_condition_prob=1.0 if many else 0.0)
    adapter = dataclasses.replace(config.adapter, dropout=0.0)
    config = dataclasses.replace(config, maturation=plain, adapter=adapter)
    key = jax.random.fold_in(jax.random.fold_in(seed_key(config.train.seed), _EVAL), index)
    negatives_key, rows_key = jax.random.split(key)
    negatives = losses.draw_negatives(negatives_key, config.objective, ids[:, 1:], unigram)
    keys, forward = objective.row_keys(rows_key, ids.shape[0]), make_forward(config)
    if many:
        windows, tails = objective.run_with_tails(params, ids, keys, config, forward)
        sums = (objective.weighted_sums(tails, params, negatives, config) if config.objective.kind == "tail" else
                objective.sums_with_tails(windows, tails, params, negatives, config))
        sums |= _by_slot(tails, settings.max_tail_length)
    else:
        windows = objective.run_windows(params, ids, keys, config, forward)
        sums = objective.weighted_sums(windows, params, negatives, config)
    rank, entropy = rank_and_entropy(windows.prediction, windows.target_ids, windows.vocabulary)
    edges = (*MATURITY_BINS, jnp.inf)
    for low, high in itertools.pairwise(edges):
        inside = (windows.weight >= low) & (windows.weight < high)
        for name, value in (("top1", rank < 1), ("top5", rank < 5), ("entropy", entropy), ("count", 1.0)):
            sums[f"{name}/maturity_{low:g}"] = jnp.sum(jnp.where(inside, value, 0.0))
    return sums


def _by_slot(tails: objective.PredictedWindows, length: int) -> dict[str, jax.Array]:
    """Sums [] of `top1` and `count` of tails of `length` K for the slots 1..K − 1; slot j becomes the token that
    follows the front by j, which the front's text does not show."""
    rank, _ = rank_and_entropy(tails.prediction, tails.target_ids, tails.vocabulary)
    right = jnp.sum((rank < 1).reshape(-1, length), axis=0)
    return {f"{name}/slot_{slot}": value for slot in range(1, length)
            for name, value in (("top1", right[slot]), ("count", jnp.float32(rank.size / length)))}


def eval_means(totals: dict[str, Any]) -> dict[str, float]:
    """Metrics from sums over batches; a maturity bin without positions is left out."""
    totals = {name: float(value) for name, value in totals.items()}
    weight = totals.pop("weight")
    means = {}
    for name, total in totals.items():
        term, _, bin_name = name.partition("/")
        count = totals[f"count/{bin_name}"] if bin_name else weight
        if term != "count" and count > 0:
            means[name] = total / count
    if "cross_entropy" in means:
        means["perplexity"] = float(np.exp(means["cross_entropy"]))
    return means


def make_train_functions(config: Config, vocab_size: int, mesh: Mesh) -> TrainFunctions:
    """The jitted functions of a run over `mesh`; call them inside `jax.set_mesh(mesh)`.

    Parameters and optimiser state are created with the shardings of `sharding.RULES`.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    has_table = config.table.initial is not None

    def init(key, table=None):
        params, frozen = split_params(init_params(key, config, vocab_size, table), config)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)

    table_shape = jax.ShapeDtypeStruct((vocab_size, config.model.embed_dim), jnp.float32) if has_table else None
    shapes = jax.eval_shape(init, seed_key(0), table_shape)
    placed = place(shapes, mesh)
    whole, rows = replicated(mesh), batch_sharding(mesh)

    def step(state, ids, unigram):
        return update(state, ids, unigram, config, optimizer)

    def evaluate(params, ids, unigram, index):
        return eval_sums(params, ids, unigram, index, config)

    return TrainFunctions(
        init=jax.jit(init, out_shardings=placed),
        step=jax.jit(step, donate_argnums=0, in_shardings=(placed, rows, whole), out_shardings=(placed, whole)),
        evaluate=jax.jit(evaluate, in_shardings=(placed.whole, rows, whole, whole), out_shardings=whole),
        shapes=jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed),
    )


