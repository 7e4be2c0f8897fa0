"""Ordinary decoding of the autoregressive baseline: greedy, penalty, nucleus, contrastive search, best of N."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.errors import UserError
from tokmat_jax.generation import cache
from tokmat_jax.generation.batches import Row, chunk, in_batches, sample_key, until_done
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.requests import Prompt, counts, is_number, whole_number
from tokmat_jax.generation.sampling import (
    LanguageModel,
    SampledStep,
    Sampling,
    SamplingState,
    checked_sampling_step,
    contrastive_step,
    sample_steps,
    sampling_step,
    start_sampling,
)
from tokmat_jax.method.ending import ends_within
from tokmat_jax.model.backbone import Forward, make_forward

Advance = Callable[[LanguageModel, SamplingState, int], tuple[SamplingState, SampledStep]]
"""(model, state, number of steps) → (state, SampledStep)."""


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt."""

    text: str
    """Text that the tokens add to that of the prompt's ids (`Tokenizer.split`), without end-of-text."""
    tokens: list[int]
    """Ids, at least one; the last one is end-of-text if `finished`."""
    log_probs: list[float]
    """Log-probability of each token in nats, under the unmodified model: temperature 1, no penalty, all of V."""
    finished: bool
    """True if it ended with end-of-text, False if it ran out of budget."""
    passes: int
    """Number of steps, each one forward pass; equal to the number of tokens unless drafts were checked."""


class Baselines:
    """The ordinary decoders of one autoregressive model.

    Prompts are texts or ids, as for `Generator.rows`, and these methods raise the same errors. A continuation depends
    only on its prompt, its number, the seed and the settings, never on `batch_size`, order or the other rows.
    """

    def __init__(self, generator: Generator):
        """Raises UserError unless `generator` holds an autoregressive model."""
        _require(generator.is_autoregressive, "ordinary decoding needs an autoregressive model (a run with "
                 f"--objective.kind ar, or an import), found a {generator.config.objective.kind} run")
        self.generator = generator
        self._compilations = 0
        self._start = jax.jit(self._trace_start, static_argnames=("capacity", "at_once"))
        self._sample = jax.jit(
            self._trace_sample, static_argnames=("num_drafts", "num_steps"), donate_argnames="state")
        self._contrast = jax.jit(
            self._trace_contrast, static_argnames=("top_k", "num_steps"), donate_argnames="state")

    def compilations(self) -> int:
        """Number of shapes compiled so far."""
        return self._compilations

    def sample(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, repetition_penalty: float = 1.0, num_samples: int = 1, seed: int = 0, batch_size: int = 64,
        num_drafts: int = 0, min_new_tokens: int = 0,
    ) -> list[Continuation]:
        """`num_samples` continuations of each prompt, sorted by prompt and then by sample number.

        The defaults are greedy decoding. If `num_drafts` M > 0, each pass also checks the M tokens that followed an
        earlier occurrence of the last tokens. This changes the number of passes, not the text. No sample ends
        before `min_new_tokens`. Raises UserError if a value is outside the ranges of `Sampling`.
        """
        _require(is_number(temperature) and temperature >= 0,
                 f"temperature must be a number from 0 (greedy) on, found {temperature}")
        _require(is_number(top_p) and 0 < top_p <= 1, f"top_p must lie in (0, 1], found {top_p}")
        _require(is_number(repetition_penalty) and repetition_penalty >= 1,
                 f"repetition_penalty must be a number from 1 (off) on, found {repetition_penalty}")
        sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.float32(repetition_penalty),
                            _ends_within(min_new_tokens, max_new_tokens))
        num_drafts = whole_number("num_drafts", num_drafts, 0)
        return self._write(prompts, max_new_tokens, num_samples, seed, batch_size,
                           lambda model, state, steps: self._sample(model, state, sampling, num_drafts=num_drafts,
                                                                    num_steps=steps), num_drafts + 1)

    def contrastive(
        self, prompts: Sequence[Prompt], max_new_tokens: int, top_k: int = 5, alpha: float = 0.6,
        batch_size: int = 64, min_new_tokens: int = 0,
    ) -> list[Continuation]:
        """One continuation of each prompt by contrastive search (Su et al. 2022), see `contrastive_step`.

        Deterministic. A `top_k` above V means V. No sample ends before `min_new_tokens`. Raises
        UserError if `top_k` < 1 or `alpha` is outside [0, 1].
        """
        top_k = whole_number("top_k", top_k, 1)
        _require(is_number(alpha) and 0 <= alpha <= 1, f"alpha must lie in [0, 1], found {alpha}")
        within = _ends_within(min_new_tokens, max_new_tokens)
        return self._write(prompts, max_new_tokens, 1, 0, batch_size,
                           lambda model, state, steps: self._contrast(model, state, jnp.float32(alpha), within,
                                                                      top_k=top_k, num_steps=steps))

    def best_of(
        self, prompts: Sequence[Prompt], max_new_tokens: int, count: int = 16, temperature: float = 1.0,
        seed: int = 0, batch_size: int = 64, min_new_tokens: int = 0,
    ) -> list[Continuation]:
        """Draws `count` samples of each prompt and keeps the one with the highest mean log-probability per token.

        This takes as many query positions per token as a liquid tail of K = `count` slots: the compute-matched
        reranking baseline (arXiv:2601.04854 v3). Ties go to the first sample. Raises UserError if `count` < 1.
        """
        count = whole_number("count", count, 1)
        samples = self.sample(prompts, max_new_tokens, temperature, num_samples=count, seed=seed,
                              batch_size=batch_size, min_new_tokens=min_new_tokens)
        return [max(samples[first : first + count], key=lambda one: math.fsum(one.log_probs) / len(one.log_probs))
                for first in range(0, len(samples), count)]

    def _write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, num_samples: int, seed: int, batch_size: int,
        advance: Advance, at_once: int = 1,
    ) -> list[Continuation]:
        """Continues the prompts with `advance`, each step of which writes up to `at_once` positions."""
        num_samples, seed, batch_size = counts(num_samples, seed, batch_size)
        generator = self.generator
        model = LanguageModel(generator.backbone, generator.vocabulary, generator.logit_scale)
        settings = dataclasses.replace(generator.settings, max_new_tokens=max_new_tokens)
        rows = generator.rows(prompts, settings, num_samples)
        return in_batches(rows, [len(row.ids) for row in rows], lambda _: (batch_size, generator.config.max_positions),
                          lambda batch: self._finish(model, batch, settings.max_new_tokens, seed, advance, at_once))

    def _finish(
        self, model: LanguageModel, rows: Sequence[Row], max_new_tokens: int, seed: int, advance: Advance,
        at_once: int,
    ) -> list[Continuation]:
        """Generates `rows` to their end as one batch."""
        batch = self.generator.batch(rows, max_new_tokens, seed)
        state = self._start(model, batch.ids, batch.lengths, batch.budgets, batch.names, capacity=batch.capacity,
                            at_once=at_once)
        num_steps = chunk(int(batch.budgets.max()), one_a_step=at_once == 1)
        whole: SampledStep = until_done(state, lambda now: advance(model, now, num_steps))
        return [self._continuation(whole, index, row.ids) for index, row in enumerate(rows)]

    def _continuation(self, steps: SampledStep, index: int, prompt: Sequence[int]) -> Continuation:
        emitted = np.asarray(steps.emitted)[:, index]
        tokens, log_probs = (np.asarray(part)[:, index][emitted].tolist() for part in (steps.tokens, steps.log_probs))
        tokenizer = self.generator.tokenizer
        return Continuation(tokenizer.split(prompt, tokens)[1], tokens, log_probs,
                            tokens[-1] in tokenizer.ends, int(np.sum(emitted[:, 0])))

    @functools.cached_property
    def _forward(self) -> Forward:
        return make_forward(self.generator.config)

    def _trace_start(self, model, ids, lengths, budgets, names, capacity, at_once):
        self._compilations += 1
        return start_sampling(model, self._forward, ids, lengths, budgets, jax.vmap(sample_key)(names),
                              cache.room_of(self.generator.config.model, capacity, at_once))

    def _trace_sample(self, model, state, sampling, num_drafts, num_steps):
        self._compilations += 1
        step = functools.partial(sampling_step, model=model, forward=self._forward, sampling=sampling,
                                 ends=self.generator.tokenizer.ends)
        if num_drafts:
            step = functools.partial(checked_sampling_step, model=model, forward=self._forward, sampling=sampling,
                                     num_drafts=num_drafts, ends=self.generator.tokenizer.ends)
        return sample_steps(state, step, num_steps)

    def _trace_contrast(self, model, state, alpha, within, top_k, num_steps):
        self._compilations += 1
        step = functools.partial(contrastive_step, model=model, forward=self._forward, alpha=alpha, top_k=top_k,
                                 ends=self.generator.tokenizer.ends, ends_within=within)
        return sample_steps(state, step, num_steps)


def _ends_within(min_new_tokens: int, max_new_tokens: int) -> jax.Array | None:
    """Raises UserError if a length is no whole number, or `min_new_tokens` is below 0."""
    return ends_within(whole_number("min_new_tokens", min_new_tokens, 0),
                       whole_number("max_new_tokens", max_new_tokens))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
