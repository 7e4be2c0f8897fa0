"""Ordinary decoding of the autoregressive baseline: greedy, penalty, nucleus, contrastive search, best of N.

    ẑ [B, d] ──► logits ──► k tokens [B, k] ──► k queries at position n ──► ẑ_v [B, k, d] ──► one v is chosen
      ▲                                         against the cache                               │
      └───────────────────── its ẑ_v; its keys and values join the cache ◄──────────────────────┘

Sampling chooses its token before it is read, so k = 1; contrastive search reads k of them in one forward pass and
chooses afterwards. Rows are independent, as in `decode.py`, and a finished one changes no more.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokmat_jax.errors import UserError
from tokmat_jax.generation import cache
from tokmat_jax.generation.batches import Row, chunk, sample_key
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.requests import Prompt, counts, is_number, whole_number
from tokmat_jax.method.table import Vocabulary, look_up, scores, unit
from tokmat_jax.model.backbone import Forward, Live, Params, make_forward


@struct.dataclass
class Sampling:
    """How a token is drawn; a pytree of numbers, so that another value compiles nothing."""

    temperature: jax.Array
    """[] ≥ 0, divides the logits; 0 takes the largest."""
    top_p: jax.Array
    """[] in (0, 1], mass of the nucleus; 1 is off."""
    repetition_penalty: jax.Array
    """[] ≥ 1; 1 is off."""


@struct.dataclass
class LanguageModel:
    """Arrays of a trained baseline. Its logits are `logit_scale` · ⟨ẑ, row of the readout⟩."""

    backbone: Params
    """Parameters of f_θ."""
    vocabulary: Vocabulary
    """What tokens are when they are read and written."""
    logit_scale: jax.Array
    """[]."""


@struct.dataclass
class State:
    """A batch in the middle of its sentence. Rows never have to agree about anything."""

    num_committed: jax.Array
    """n [B], tokens so far, prompt included; all of them are in `history`."""
    prediction: jax.Array
    """ẑ [B, d] for position n."""
    seen: jax.Array
    """[B, V] bool: the token occurs among the n."""
    context: jax.Array
    """[B, S, d]; entry j < n is the direction, of norm 1, of the model's output after it read token j."""
    key: jax.Array
    """One key per row [B]; with the position it decides the row's draws."""
    budget: jax.Array
    """[B], n at which a row stops."""
    done: jax.Array
    """[B] bool: the row has written end-of-text or spent its budget and changes no more."""
    history: Live
    """Keys and values, a History per layer; like those of `context`, entries from n on are not read."""


@struct.dataclass
class Step:
    """What one step did."""

    emitted: jax.Array
    """[B] bool: the row was alive, so that its token counts."""
    tokens: jax.Array
    """[B]."""
    log_probs: jax.Array
    """[B], nats, of the model as it is: temperature 1, no penalty, all of V."""


StepFunction = Callable[[State], tuple[State, Step]]


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """`logits` [B, V] with those of the `seen` [B, V] tokens divided by `penalty` where positive, else multiplied.

    Keskar et al. 2019 (CTRL, arXiv:1909.05858, §4.1), in the form that `transformers` gave it for logits of both
    signs; what is seen includes the prompt.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """`logits` [B, V], −∞ outside the smallest set of likeliest tokens whose mass reaches `top_p` in (0, 1].

    Holtzman et al. 2020 (arXiv:1904.09751, §3.1). At least one token stays, and all that are as likely as the last one.
    """

    def cut():
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        mass_before = jnp.cumsum(share, axis=-1) - share
        least = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    # Rounding in the sum must not cut anything off where the nucleus is everything.
    return jax.lax.cond(jnp.asarray(top_p) < 1.0, cut, lambda: logits)


def choose(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Tokens [B] of `logits` [B, V], penalised already, with one of `key` [B] per row: temperature, then nucleus."""

    def drawn():
        return jax.vmap(jax.random.categorical)(key, nucleus(logits / sampling.temperature, sampling.top_p))

    token = jax.lax.cond(sampling.temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1))
    return token.astype(jnp.int32)


def start(
    model: LanguageModel, forward: Forward, ids: jax.Array, lengths: jax.Array, max_new_tokens: jax.Array,
    key: jax.Array, capacity: int,
) -> State:
    """The state behind prompts `ids` [B, P] of `lengths` [B] (at least 1), filled up with anything behind their end.

    `max_new_tokens` [B] is what each row may write (0 = finished from the start), `key` [B] one per row, `capacity`
    ≥ P the positions that there are.
    """
    batch, width = ids.shape
    told = jnp.zeros((batch,), jnp.int32)
    vectors = look_up(model.vocabulary.table, ids)
    prediction, history = cache.read_prompts(functools.partial(forward, model.backbone), vectors, told, capacity)
    seen = jnp.zeros((batch, model.vocabulary.table.shape[0]), bool)
    return State(
        num_committed=lengths,
        prediction=jnp.take_along_axis(prediction, (lengths - 1)[:, None, None], axis=1)[:, 0],
        seen=_mark(seen, ids, jnp.arange(width)[None, :] < lengths[:, None]),
        context=jnp.pad(unit(prediction), ((0, 0), (0, capacity - width), (0, 0))),
        key=key,
        budget=lengths + max_new_tokens,
        done=max_new_tokens <= 0,
        history=history,
    )


def sampling_step(
    state: State, model: LanguageModel, forward: Forward, sampling: Sampling, end_of_text: int
) -> tuple[State, Step]:
    """One token per row: penalty, temperature, nucleus, draw, as `transformers` orders them."""
    logits = _logits(model, state.prediction)
    key = jax.vmap(jax.random.fold_in)(state.key, state.num_committed)
    token = choose(key, penalise(logits, state.seen, sampling.repetition_penalty), sampling)[:, None]
    prediction, live = _read(model, forward, state, token)
    return _commit(state, logits, token, prediction, live, jnp.zeros_like(state.num_committed), end_of_text)


def contrastive_step(
    state: State, model: LanguageModel, forward: Forward, alpha: jax.Array, top_k: int, end_of_text: int
) -> tuple[State, Step]:
    """One token per row: argmax over the `top_k` likeliest v of (1 − α) p(v | x_<t) − α max_j cos(h_v, h_{x_j}).

    Su et al. 2022 (arXiv:2202.06417, §3, contrastive search). j runs over the whole context, prompt included; h_x is
    the model's output after it read x; `alpha` [] in [0, 1], where 0 is greedy.
    """
    logits = _logits(model, state.prediction)
    likeliest, tokens = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    prediction, live = _read(model, forward, state, tokens)
    cosine = jnp.einsum("bkd,bsd->bks", unit(prediction), state.context)
    written = jnp.arange(state.context.shape[1])[None, None, :] < state.num_committed[:, None, None]
    degeneration = jnp.max(jnp.where(written, cosine, -jnp.inf), axis=-1)
    confidence = jnp.exp(likeliest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    pick = jnp.argmax((1.0 - alpha) * confidence - alpha * degeneration, axis=-1).astype(jnp.int32)
    return _commit(state, logits, tokens, prediction, live, pick, end_of_text)


def run(state: State, step: StepFunction, num_steps: int) -> tuple[State, Step]:
    """`num_steps` of `step` as one scan; the fields of the Step returned lead with the step, [steps, B]."""
    return jax.lax.scan(lambda state, _: step(state), state, length=num_steps)


def _logits(model: LanguageModel, prediction: jax.Array) -> jax.Array:
    return model.logit_scale * scores(prediction, model.vocabulary.readout)


def _mark(seen: jax.Array, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """`seen` [B, V] with `ids` [B, T] where `valid` [B, T]."""
    batch, vocab_size = seen.shape
    return seen.at[jnp.arange(batch)[:, None], jnp.where(valid, ids, vocab_size)].set(True, mode="drop")


def _read(model: LanguageModel, forward: Forward, state: State, tokens: jax.Array) -> tuple[jax.Array, Live]:
    """Predictions [B, k, d] behind each of `tokens` [B, k] at position n, and their keys and values layer by layer.

    The k are alternatives: each sees the history and itself.
    """
    batch, count = tokens.shape
    positions = jnp.broadcast_to(state.num_committed[:, None], (batch, count))
    visible = jnp.arange(state.history[0].capacity)[None, :] < state.num_committed[:, None]
    return forward(
        model.backbone, look_up(model.vocabulary.table, tokens), jnp.ones((batch, count)),
        jnp.zeros((batch,), jnp.int32), positions, mask=jnp.eye(count, dtype=bool)[None], history=state.history,
        visible=visible,
    )


def _commit(
    state: State, logits: jax.Array, tokens: jax.Array, prediction: jax.Array, live: Live, pick: jax.Array,
    end_of_text: int,
) -> tuple[State, Step]:
    """The state after number `pick` [B] of `tokens` [B, k] took position n, with what `_read` said of it.

    A row that is done keeps its state; what it writes at n lies behind its end and is not read.
    """
    alive = ~state.done
    token = jnp.take_along_axis(tokens, pick[:, None], axis=1)
    ahead = jnp.take_along_axis(prediction, pick[:, None, None], axis=1)[:, 0]
    chosen = jax.tree.map(lambda x: jnp.take_along_axis(x, pick[:, None, None, None], axis=2), live)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token, axis=1)[:, 0]
    num_committed = state.num_committed + alive.astype(jnp.int32)
    after = State(
        num_committed=num_committed,
        prediction=jnp.where(alive[:, None], ahead, state.prediction),
        seen=_mark(state.seen, token, alive[:, None]),
        context=state.context.at[jnp.arange(pick.shape[0]), state.num_committed].set(unit(ahead)),
        key=state.key,
        budget=state.budget,
        done=state.done | (token[:, 0] == end_of_text) | (num_committed >= state.budget),
        history=cache.append(state.history, chosen, state.num_committed[:, None]),
    )
    return after, Step(alive, token[:, 0], log_prob)


@dataclass(frozen=True)
class Continuation:
    """What was written behind one prompt."""

    text: str
    """What the tokens add to the text of the prompt's ids (`Tokenizer.split`), without end-of-text."""
    tokens: list[int]
    """Ids, at least one; the last one is end-of-text where `finished`."""
    log_probs: list[float]
    """Per token, nats, under the model as it is: temperature 1, no penalty, all of V."""
    finished: bool
    """Whether it ended with end-of-text rather than with its budget."""


class Baselines:
    """The ordinary decoders of one autoregressive model.

    Prompts are texts or ids, as for `Generator.rows`, whose errors these methods raise too. A continuation depends on
    its prompt, its number, the seed and the settings alone, never on `batch_size`, order or neighbours.
    """

    def __init__(self, generator: Generator):
        """Raises UserError unless `generator` holds an autoregressive model."""
        _require(generator.is_autoregressive, "ordinary decoding needs an autoregressive model (a run with "
                 "--objective.kind ar, or an import), found a maturation run")
        self.generator = generator
        self._compilations = 0
        self._start = jax.jit(self._trace_start, static_argnames="capacity")
        self._sample = jax.jit(self._trace_sample, static_argnames="num_steps", donate_argnames="state")
        self._contrast = jax.jit(
            self._trace_contrast, static_argnames=("top_k", "num_steps"), donate_argnames="state")

    def compilations(self) -> int:
        """How many shapes have been compiled so far."""
        return self._compilations

    def sample(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, repetition_penalty: float = 1.0, num_samples: int = 1, seed: int = 0, batch_size: int = 64,
    ) -> list[Continuation]:
        """`num_samples` continuations of each prompt: prompts in their order, for each its samples in theirs.

        The defaults are greedy decoding. Raises UserError for a value outside the ranges of `Sampling`.
        """
        _require(is_number(temperature) and temperature >= 0,
                 f"temperature must be a number from 0 (greedy) on, found {temperature}")
        _require(is_number(top_p) and 0 < top_p <= 1, f"top_p must lie in (0, 1], found {top_p}")
        _require(is_number(repetition_penalty) and repetition_penalty >= 1,
                 f"repetition_penalty must be a number from 1 (off) on, found {repetition_penalty}")
        sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.float32(repetition_penalty))
        return self._write(prompts, max_new_tokens, num_samples, seed, batch_size,
                           lambda model, state, steps: self._sample(model, state, sampling, num_steps=steps))

    def contrastive(
        self, prompts: Sequence[Prompt], max_new_tokens: int, top_k: int = 5, alpha: float = 0.6,
        batch_size: int = 64,
    ) -> list[Continuation]:
        """One continuation of each prompt by contrastive search (Su et al. 2022), see `contrastive_step`.

        Nothing is drawn. A `top_k` above V means V. Raises UserError for `top_k` < 1 or `alpha` outside [0, 1].
        """
        top_k = whole_number("top_k", top_k, 1)
        _require(is_number(alpha) and 0 <= alpha <= 1, f"alpha must lie in [0, 1], found {alpha}")
        return self._write(prompts, max_new_tokens, 1, 0, batch_size,
                           lambda model, state, steps: self._contrast(model, state, jnp.float32(alpha), top_k=top_k,
                                                                      num_steps=steps))

    def best_of(
        self, prompts: Sequence[Prompt], max_new_tokens: int, count: int = 16, temperature: float = 1.0,
        seed: int = 0, batch_size: int = 64,
    ) -> list[Continuation]:
        """Of `count` samples of each prompt, the one with the highest mean log-probability per token.

        As many query positions per token as a liquid tail of K = `count` slots: the compute-matched reranking
        baseline (arXiv:2601.04854 v3). Of equal ones the first wins. Raises UserError for `count` < 1.
        """
        count = whole_number("count", count, 1)
        samples = self.sample(prompts, max_new_tokens, temperature, num_samples=count, seed=seed,
                              batch_size=batch_size)
        return [max(samples[first : first + count], key=lambda one: math.fsum(one.log_probs) / len(one.log_probs))
                for first in range(0, len(samples), count)]

    def _write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, num_samples: int, seed: int,
        batch_size: int, advance: Callable[[LanguageModel, State, int], tuple[State, Step]],
    ) -> list[Continuation]:
        num_samples, seed, batch_size = counts(num_samples, seed, batch_size)
        generator = self.generator
        model = LanguageModel(generator.backbone, generator.vocabulary, generator.logit_scale)
        settings = dataclasses.replace(generator.settings, max_new_tokens=max_new_tokens)
        rows = generator.rows(prompts, settings, num_samples)
        written: dict[int, Continuation] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for begin in range(0, len(rows), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = [rows[index] for index in chosen]
            written |= zip(chosen, self._finish(model, batch, settings.max_new_tokens, seed, advance), strict=True)
        return [written[index] for index in range(len(rows))]

    def _finish(
        self, model: LanguageModel, rows: Sequence[Row], max_new_tokens: int, seed: int,
        advance: Callable[[LanguageModel, State, int], tuple[State, Step]],
    ) -> list[Continuation]:
        """`rows` as one batch, written to their end."""
        batch = self.generator.batch(rows, max_new_tokens, seed)
        state = self._start(model, batch.ids, batch.lengths, batch.budgets, batch.names, capacity=batch.capacity)
        steps, at_once = [], chunk(int(batch.budgets.max()))
        while not bool(jnp.all(state.done)):
            state, step = advance(model, state, at_once)
            steps.append(jax.tree.map(np.asarray, step))
        whole: Step = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
        return [self._continuation(whole, index, row.ids) for index, row in enumerate(rows)]

    def _continuation(self, steps: Step, index: int, prompt: Sequence[int]) -> Continuation:
        emitted = np.asarray(steps.emitted)[:, index]
        tokens, log_probs = (np.asarray(part)[emitted, index].tolist() for part in (steps.tokens, steps.log_probs))
        tokenizer = self.generator.tokenizer
        return Continuation(tokenizer.split(prompt, tokens)[1], tokens, log_probs,
                            tokens[-1] == tokenizer.end_of_text)

    @functools.cached_property
    def _forward(self) -> Forward:
        return make_forward(self.generator.config)

    def _trace_start(self, model, ids, lengths, budgets, names, capacity):
        self._compilations += 1
        return start(model, self._forward, ids, lengths, budgets, jax.vmap(sample_key)(names), capacity)

    def _trace_sample(self, model, state, sampling, num_steps):
        self._compilations += 1
        end = self.generator.tokenizer.end_of_text
        return run(state, lambda now: sampling_step(now, model, self._forward, sampling, end), num_steps)

    def _trace_contrast(self, model, state, alpha, top_k, num_steps):
        self._compilations += 1
        end = self.generator.tokenizer.end_of_text
        return run(state, lambda now: contrastive_step(now, model, self._forward, alpha, top_k, end), num_steps)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
