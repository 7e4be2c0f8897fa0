"""The article's figures: how tails mature after one prompt, what seeds change, how training moved the table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import GenerationConfig
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation import figures
from tokmat_jax.evaluation.measurement import Options
from tokmat_jax.generation.generator import Generator
from tokmat_jax.keys import seed_key
from tokmat_jax.model.params import init_params, vocabulary_of
from tokmat_jax.storage.npy import open_npy

Part = Callable[[str, str, Any, Callable[[], Any]], Any]
"""(name, kind, settings, make) → the part of a `kind` under `settings`, which `make` computes unless it is stored."""
_LEAST_ROOM = 8
"""Positions after the prompt without which no figure can be made."""


class Article:
    """The figures of one evaluation."""

    def __init__(
        self, run: Generator, baseline: Generator, options: Options, plain: GenerationConfig, part: Part
    ):
        """`plain` are the settings of the plain algorithm. Raises UserError if the prompt leaves no room for them."""
        self.run, self.baseline, self.options = run, baseline, options
        self._plain, self._part = plain, part
        one_step = dataclasses.replace(run.config.generation.with_tail_length(1), max_new_tokens=1)
        self._room = run.config.max_positions - len(run.rows([options.prompt], one_step)[0].ids)
        if self._room < _LEAST_ROOM:
            positions = run.config.max_positions
            raise UserError(f"--prompt has {positions - self._room} tokens, which leaves {self._room} of the model's "
                            f"{positions} positions: shorten it")

    def data(self) -> dict[str, Any]:
        """All figures but what tails foresee."""
        options, run, room = self.options, self.run, self._room
        piece = run.tokenizer.piece
        kappa = float(run.logit_scale) * (run.config.table.radius**2)
        temperatures = (1.0, 1.0 / kappa)
        length = min(options.max_new_tokens, 64, room // 2)
        plain = dataclasses.replace(self._plain, max_new_tokens=length)
        plain = dataclasses.replace(plain, tail_length=min(plain.tail_length, room - length))
        tails = [k for k in (1, 2, 4, 8, 16, 32) if k <= room - length]
        trained = run.config.maturation.max_tail_length
        # The sample must be long enough that some tokens pass through the whole tail.
        whole = dataclasses.replace(plain, tail_length=max(k for k in tails if k <= min(trained, length // 2)))

        def record(settings: GenerationConfig, prompt: str | Sequence[int] = options.prompt, temperature: float = 1.0):
            settings = dataclasses.replace(settings, entropy_temperature=temperature)
            return run.record(prompt, settings, seed=options.seed)

        def maturing():
            soft, sharp = (record(whole, temperature=temperature) for temperature in temperatures)
            return figures.maturing(sharp, soft, piece)

        def readouts():
            before = run.rows([options.prompt], plain)[0].ids
            return {f"{scale:g}": figures.readout(
                record(dataclasses.replace(plain, guidance_scale=scale)),
                lambda ids: run.tokenizer.split(before, ids)[1], piece) for scale in figures.SCALES}

        def attractors():
            own = dataclasses.replace(run.config.generation, max_new_tokens=length)
            own = own.with_tail_length(min(own.tail_length, room - length))
            samples = run.generate([options.prompt], own, options.num_seeds, options.seed, options.batch_size)
            return figures.attractors([sample.tokens for sample in samples], piece)

        asked = [options.prompt, length, options.num_seeds]
        return {
            "prompt": options.prompt, "temperatures": temperatures,
            "maturing": self._part("tokens through maturation", "maturing", asked, maturing),
            "readout": self._part("the tail with and without guidance", "readout", asked, readouts),
            "diversity": self._part("K against diversity", "diversity", asked, lambda: figures.diversity_by_tail(
                run, options.prompt, plain, tails, options.num_seeds, options.seed, options.batch_size)),
            "attractors": self._part("template attractors", "attractors", asked, attractors),
            "geometry": self._part("geometry of the tables", "geometry", None, self._geometry),
        }

    def _geometry(self) -> dict[str, Any]:
        found = {}
        for name, one in (("maturation", self.run), ("baseline", self.baseline)):
            before = starting_table(one)
            if before is not None:
                found[name] = figures.table_geometry(before, np.asarray(one.vocabulary.table))
        return found



def starting_table(generator: Generator) -> np.ndarray | None:
    """The table [V, d] that a run started with; None if its source no longer exists or has another shape."""
    config, shape = generator.config, generator.vocabulary.table.shape
    try:
        if config.init_from is not None:
            rows = Generator.from_workdir(config.init_from).params["table"]
        elif config.table.initial is not None:
            stored = open_npy(config.table.initial)
            if stored.shape != shape:
                return None
            rows = jnp.asarray(stored.astype(np.float32))
        else:
            rows = jax.jit(lambda: init_params(seed_key(config.train.seed), config, shape[0])["table"])()
    except UserError:
        return None
    return np.asarray(vocabulary_of({"table": rows}, config).table) if rows.shape == shape else None


