"""Settings that a run takes over from the run that it starts from."""

import dataclasses
import operator

from tokmat_jax.config.checks import facts_of
from tokmat_jax.config.model import ModelConfig
from tokmat_jax.config.run import Config
from tokmat_jax.config.text import TokenizerConfig
from tokmat_jax.errors import UserError


def adopt(config: Config, source: Config, path: str, kind: str) -> Config:
    """`config` with the model's shape and the tokenizer of the run `source`, whose workdir is `path`.

    If both `kind` and the source's objective are "ar", the table's geometry, the head and κ are taken over too, so
    that the language model continues unchanged. If `kind` is "maturation", the table is projected onto the sphere.
    """
    kept = {name: getattr(config.model, name) for name, own in facts_of(ModelConfig, "own").items() if own}
    model = dataclasses.replace(source.model, **kept, max_positions=source.max_positions)
    table = dataclasses.replace(config.table, radius=source.table.radius, initial=None)
    objective = config.objective
    if kind == "ar" and source.objective.kind == "ar":
        model = dataclasses.replace(model, head=source.model.head)
        table = dataclasses.replace(table, geometry=source.table.geometry, tied=source.table.tied)
        objective = dataclasses.replace(objective, kind="ar", logit_scale=source.objective.logit_scale,
                                        learn_logit_scale=source.objective.learn_logit_scale)
    return dataclasses.replace(config, init_from=path, model=model, table=table, objective=objective,
                               tokenizer=TokenizerConfig(kind="workdir", name=path))


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
    if not config.table.tied and source.table.tied:
        raise UserError(f"init_from: {config.init_from} has one tied table, this run asks for table.tied False")
    if config.model.head == "identity" and source.model.head != "identity":
        raise UserError(f"init_from: {config.init_from} has a linear head, this run asks for model.head 'identity'")
    k_max = source.maturation.max_tail_length
    if source.objective.kind == "maturation" and config.maturation.max_tail_length != k_max:
        raise UserError(f"init_from: {config.init_from} was matured with maturation.max_tail_length (K_max) {k_max}, "
                        f"this run asks for {config.maturation.max_tail_length}: give the same value")
