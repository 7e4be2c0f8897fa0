"""Settings that a run takes over from the run that it starts from."""

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

from tokmat_jax.config.checks import facts_of
from tokmat_jax.config.model import ModelConfig
from tokmat_jax.config.run import Config
from tokmat_jax.config.text import TokenizerConfig
from tokmat_jax.errors import UserError

FOLLOWING = (
    "optimizer.learning_rate", "optimizer.warmup_steps", "objective.negatives", "maturation.tail_noise",
    "maturation.max_maturity", "generation.tail_noise", "generation.max_maturity", "generation.repulsion",
    "generation.rate", "maturation.self_condition_prob", "generation.tail_length",
)
"""Settings that follow from the source if nobody gives them."""
_PRETRAINED = {"optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 20}
"""The rate for raw tables, which only pretrained weights have: 2e-3 ruins SmolLM2 (docs/research-log.md)."""
_IN_FRONT = {"optimizer.learning_rate": 1e-3, "objective.negatives": "full", "maturation.self_condition_prob": 0.7,
             "generation.rate": 1.0}
"""What trains a tail in front of a language model. With embryos alone its slots hardly learn (docs/research-log.md)."""
_MATURED = {"objective.negatives": "full", "maturation.tail_noise": 1.0, "maturation.max_maturity": 0.6,
            "generation.repulsion": 0.5, "generation.rate": 0.9}
"""What matures a language model; the tail is then generated with the noise and the maturity of training. The rate keeps
the noise of young slots out of the front (docs/research-log.md)."""


def adopt(config: Config, source: Config, path: str, kind: str) -> Config:
    """`config` with the model's shape and the tokenizer of the run `source`, whose workdir is `path`.

    If the source's objective is "ar" and `kind` is "ar" or "tail", the table's geometry, the head and κ are taken over
    too, so that the language model continues unchanged. If `kind` is "maturation", the table is projected onto the
    sphere.
    """
    kept = {name: getattr(config.model, name) for name, own in facts_of(ModelConfig, "own").items() if own}
    model = dataclasses.replace(source.model, **kept, max_positions=source.max_positions)
    table = dataclasses.replace(config.table, radius=source.table.radius, initial=None)
    objective = config.objective
    if kind in ("ar", "tail") and source.objective.kind in ("ar", kind):  # or this run itself, which has begun
        model = dataclasses.replace(model, head=source.model.head)
        table = dataclasses.replace(table, geometry=source.table.geometry, tied=source.table.tied)
        objective = dataclasses.replace(objective, kind=kind, logit_scale=source.objective.logit_scale,
                                        learn_logit_scale=source.objective.learn_logit_scale)
    return dataclasses.replace(config, init_from=path, model=model, table=table, objective=objective,
                               tokenizer=TokenizerConfig(kind="workdir", name=path))


def follow(config: Config, source: Config, given: Collection[str], begun: bool) -> tuple[Config, dict[str, Any]]:
    """`config` with the settings of `FOLLOWING` that suit the model of `source`; those that are `given` stay.

    Also returns those that changed, {dotted name: value}. If this run has `begun`, `source` is its own config: its
    values are kept and none is chosen again, so the dict is empty. A source that is matured already changes nothing.
    """
    before = config
    values = {name: value_at(source, name) for name in FOLLOWING} if begun else _suited(config, source)
    config = _with(config, {name: value for name, value in values.items() if name not in given})
    if not begun and {*_MATURED} & {*values}:
        tail = {f"generation.{name}": getattr(config.maturation, name) for name in ("tail_noise", "max_maturity")}
        config = _with(config, {name: value for name, value in tail.items() if name not in given})
    changed = {name: value_at(config, name) for name in FOLLOWING if value_at(config, name) != value_at(before, name)}
    return config, {} if begun else changed


def _suited(config: Config, source: Config) -> dict[str, Any]:
    """Values for a run of `config` that starts from the language model `source`; none if the source is matured."""
    if source.objective.kind != "ar":
        return {}
    # A baseline of ours goes on at the rate that it was trained with.
    if config.objective.kind == "tail":
        return _PRETRAINED | _IN_FRONT | {"generation.tail_length": config.maturation.max_tail_length}
    rates = _PRETRAINED if source.table.geometry == "raw" else {name: value_at(source, name) for name in _PRETRAINED}
    return rates | (_MATURED if config.objective.kind == "maturation" else {})


def value_at(config: Config, name: str) -> Any:
    """The value of the dotted field `name`."""
    return operator.attrgetter(name)(config)


def _with(config: Config, values: dict[str, Any]) -> Config:
    """`config` with other `values` {section.field: value}."""
    for name, value in values.items():
        section, field = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def check_source(config: Config, source: Config) -> None:
    """Raises UserError, naming the field, if the model of `config` differs from that of `source` in shape or K_max."""
    for name, own in facts_of(ModelConfig, "own").items():
        if own:
            continue
        asked, found = (
            run.max_positions if name == "max_positions" else operator.attrgetter(name)(run.model)
            for run in (config, source)
        )
        if asked != found:
            raise UserError(f"init_from: {config.init_from} has model.{name} = {found!r}, this run asks for "
                            f"{asked!r}: leave it out, or give the same value")
    if config.objective.kind == "tail" and source.objective.kind != "ar":
        raise UserError(f"init_from: {config.init_from} is a run with a tail of its own; objective.kind 'tail' goes in "
                        f"front of a language model")
    if not config.table.tied and source.table.tied:
        raise UserError(f"init_from: {config.init_from} has one tied table, this run asks for table.tied False")
    if config.model.head == "identity" and source.model.head != "identity":
        raise UserError(f"init_from: {config.init_from} has a linear head, this run asks for model.head 'identity'")
    k_max = source.maturation.max_tail_length
    if source.objective.kind == "maturation" and config.maturation.max_tail_length != k_max:
        raise UserError(f"init_from: {config.init_from} was matured with maturation.max_tail_length (K_max) {k_max}, "
                        f"this run asks for {config.maturation.max_tail_length}: give the same value")
