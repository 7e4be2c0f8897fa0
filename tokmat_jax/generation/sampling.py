"""Steps of ordinary decoding, as pure functions over arrays.

    ẑ [B, d] ──► logits ──► k tokens [B, k] ──► k queries at position n ──► ẑ_v [B, k, d] ──► one v is chosen
      ▲                                         against the cache                               │
      └───────────────────── its ẑ_v; its keys and values join the cache ◄──────────────────────┘

Sampling chooses a token before the model reads it, so k = 1. Contrastive search reads k tokens in one forward pass and
chooses afterwards. Rows are independent, as in `method/algorithm.py`, and finished rows no longer change.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.generation import cache
from tokmat_jax.method.ending import Ends, bar, is_end
from tokmat_jax.method.table import Vocabulary, look_up, scores, unit
from tokmat_jax.method.verification import look_up_drafts
from tokmat_jax.model.backbone import Forward, KVCache, Params


@struct.dataclass
class Sampling:
    """Sampling parameters; a pytree of numbers, so that new values need no compilation."""

    temperature: jax.Array
    """[] ≥ 0, divides the logits; 0 takes the largest."""
    top_p: jax.Array
    """[] in (0, 1], mass of the nucleus; 1 is off."""
    repetition_penalty: jax.Array
    """[] ≥ 1; 1 is off."""
    ends_within: jax.Array | None = None
    """[] number of last tokens of the budget among which a sample may end; None if it may end anywhere."""


@struct.dataclass
class LanguageModel:
    """Arrays of a trained baseline. Logits are `logit_scale` · ⟨ẑ, row of the readout⟩."""

    backbone: Params
    """Parameters of f_θ."""
    vocabulary: Vocabulary
    """The vocabulary table, which reads and writes tokens."""
    logit_scale: jax.Array
    """[]."""


@struct.dataclass
class SamplingState:
    """State of a batch during decoding. Rows may have different lengths and budgets."""

    num_committed: jax.Array
    """n [B], number of tokens so far, prompt included; all of them are in `history`."""
    prediction: jax.Array
    """ẑ [B, d] for position n."""
    seen: jax.Array
    """[B, V] bool: the token is among the first n."""
    context: jax.Array
    """[B, S, d]; entry j < n is the direction, of norm 1, of the model's output after it read token j."""
    key: jax.Array
    """One key per row [B]; key and position determine each draw."""
    budget: jax.Array
    """[B], n at which a row stops."""
    done: jax.Array
    """[B] bool: the row has committed end-of-text or spent its budget, and no longer changes."""
    history: KVCache
    """Keys and values, one LayerCache per layer; entries from n on are not read, as in `context`."""
    text: jax.Array
    """Tokens [B, S] of the n committed positions."""


@struct.dataclass
class SampledStep:
    """Result of one step."""

    emitted: jax.Array
    """[B, R] bool: the token counts. The row was not done and, for all but the first token, the draft was right."""
    tokens: jax.Array
    """[B, R]; R = 1 unless drafts are checked."""
    log_probs: jax.Array
    """[B, R], nats, under the unmodified model: temperature 1, no penalty, all of V."""


StepFunction = Callable[[SamplingState], tuple[SamplingState, SampledStep]]


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divides the `logits` [B, V] of `seen` [B, V] tokens by `penalty` if they are positive, else multiplies them.

    Keskar et al. 2019 (CTRL, arXiv:1909.05858, §4.1), in the variant of `transformers` for logits of both signs. The
    tokens of the prompt count as seen.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """`logits` [B, V], −∞ outside the smallest set of likeliest tokens whose mass reaches `top_p` in (0, 1].

    Holtzman et al. 2020 (arXiv:1904.09751, §3.1). Keeps at least one token, and all ties of the last one.
    """

    def cut():
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        mass_before = jnp.cumsum(share, axis=-1) - share
        least = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    # Rounding in the sum must not remove a token if the nucleus is the whole vocabulary.
    return jax.lax.cond(jnp.asarray(top_p) < 1.0, cut, lambda: logits)


def choose(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws tokens [B] from penalised `logits` [B, V] with one `key` [B] per row: temperature, then nucleus."""

    def drawn():
        return jax.vmap(jax.random.categorical)(key, nucleus(logits / sampling.temperature, sampling.top_p))

    token = jax.lax.cond(sampling.temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1))
    return token.astype(jnp.int32)


def start_sampling(
    model: LanguageModel, forward: Forward, ids: jax.Array, lengths: jax.Array, max_new_tokens: jax.Array,
    key: jax.Array, room: cache.Room,
) -> SamplingState:
    """The state after the prompts `ids` [B, P] of `lengths` [B] (at least 1); the padding after their end is ignored.

    `max_new_tokens` [B] is the budget of each row (0 = finished from the start), `key` [B] has one key per row, and
    `room` has at least P positions.
    """
    batch, width = ids.shape
    told = jnp.zeros((batch,), jnp.int32)
    vectors = look_up(model.vocabulary.table, ids)
    prediction, history = cache.read_prompts(functools.partial(forward, model.backbone), vectors, told, lengths, room)
    seen = jnp.zeros((batch, model.vocabulary.table.shape[0]), bool)
    return SamplingState(
        num_committed=lengths,
        prediction=jnp.take_along_axis(prediction, (lengths - 1)[:, None, None], axis=1)[:, 0],
        seen=_mark(seen, ids, jnp.arange(width)[None, :] < lengths[:, None]),
        context=jnp.pad(unit(prediction), ((0, 0), (0, room.capacity - width), (0, 0))),
        key=key,
        budget=lengths + max_new_tokens,
        done=max_new_tokens <= 0,
        history=history,
        text=jnp.pad(ids, ((0, 0), (0, room.capacity - width))),
    )


def sampling_step(
    state: SamplingState, model: LanguageModel, forward: Forward, sampling: Sampling, ends: Ends
) -> tuple[SamplingState, SampledStep]:
    """One token per row: penalty, temperature, nucleus, draw, in the order of `transformers`."""
    logits = _logits(model, state.prediction)
    token = _draw(state, logits, state.seen, state.num_committed, sampling, ends)[:, None]
    prediction, live = _read(model, forward, state, token)
    return _commit(state, logits, token, prediction, live, jnp.zeros_like(state.num_committed), ends)


def _draw(
    state: SamplingState, logits: jax.Array, seen: jax.Array, position: jax.Array, sampling: Sampling, ends: Ends
) -> jax.Array:
    """Tokens [B] that the rows' keys draw at `position` [B]. The draw depends only on key and position, not on the
    number of passes."""
    key = jax.vmap(jax.random.fold_in)(state.key, position)
    logits = _allowed(logits, state.budget - position, sampling.ends_within, ends)
    return choose(key, penalise(logits, seen, sampling.repetition_penalty), sampling)


def _allowed(logits: jax.Array, remaining: jax.Array, within: jax.Array | None, ends: Ends) -> jax.Array:
    """`logits` [B, V], −∞ for ends that are barred where `remaining` [B] tokens of the budget are left."""
    barred = bar(remaining, within, ends)
    return logits if barred is None else barred.allowed(logits, jnp.arange(logits.shape[-1]))


def checked_sampling_step(
    state: SamplingState, model: LanguageModel, forward: Forward, sampling: Sampling, num_drafts: int, ends: Ends
) -> tuple[SamplingState, SampledStep]:
    """As `sampling_step`, but also checks M = `num_drafts` drafts in the same pass: the tokens that followed an earlier
    occurrence of the last tokens (prompt lookup). A draft that equals the draw at its position is committed too.

    Gives the ordinary sample token for token, 1 to M + 1 tokens a pass (`method/verification.py` does the same for a
    tail).
    """
    n, rows = state.num_committed, jnp.arange(state.num_committed.shape[0])
    logits = [_logits(model, state.prediction)]
    first = _draw(state, logits[0], state.seen, n, sampling, ends)
    text = state.text.at[rows, n].set(first, mode="drop")
    drafts = look_up_drafts(text, n + 1, num_drafts)
    tokens = jnp.concatenate([first[:, None], jnp.maximum(drafts, 0)], axis=1)
    place = n[:, None] + jnp.arange(num_drafts + 1)[None, :]
    capacity = state.text.shape[1]
    prediction, live = forward(
        model.backbone, look_up(model.vocabulary.table, tokens), jnp.ones(tokens.shape), jnp.zeros_like(n),
        jnp.minimum(place, capacity - 1), history=state.history,
        num_visible=n)
    emitted, seen = [~state.done], _mark(state.seen, first[:, None], ~state.done[:, None])
    for index in range(num_drafts):
        logits.append(_logits(model, prediction[:, index]))
        drawn = _draw(state, logits[-1], seen, n + 1 + index, sampling, ends)
        right = emitted[-1] & ~is_end(tokens[:, index], ends) & (n + 1 + index < state.budget)
        emitted.append(right & (drawn == drafts[:, index]))
        seen = _mark(seen, drawn[:, None], emitted[-1][:, None])
    is_new = jnp.stack(emitted, axis=1)
    count = jnp.sum(is_new, axis=1)
    log_probs = jnp.stack([jnp.take_along_axis(jax.nn.log_softmax(one, axis=-1), tokens[:, [index]], axis=1)[:, 0]
                           for index, one in enumerate(logits)], axis=1)
    ahead = jnp.take_along_axis(prediction, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    after = SamplingState(
        num_committed=n + count,
        prediction=jnp.where(state.done[:, None], state.prediction, ahead),
        seen=seen,
        context=state.context.at[rows[:, None], place].set(unit(prediction), mode="drop"),
        key=state.key,
        budget=state.budget,
        done=state.done | jnp.any(is_new & is_end(tokens, ends), axis=1) | (n + count >= state.budget),
        history=cache.append(state.history, live, place),
        text=state.text.at[rows[:, None], place].set(tokens, mode="drop"),
    )
    return after, SampledStep(is_new, tokens, log_probs)


def contrastive_step(
    state: SamplingState, model: LanguageModel, forward: Forward, alpha: jax.Array, top_k: int, ends: Ends,
    ends_within: jax.Array | None = None,
) -> tuple[SamplingState, SampledStep]:
    """One token per row: argmax over the `top_k` likeliest v of (1 − α) p(v | x_<t) − α max_j cos(h_v, h_{x_j}).

    Su et al. 2022 (arXiv:2202.06417, §3, contrastive search). j runs over the whole context, prompt included; h_x is
    the model's output after it read x; `alpha` [] is in [0, 1], and 0 is greedy.
    """
    logits = _logits(model, state.prediction)
    allowed = _allowed(logits, state.budget - state.num_committed, ends_within, ends)
    likeliest, tokens = jax.lax.top_k(allowed, min(top_k, logits.shape[-1]))
    prediction, live = _read(model, forward, state, tokens)
    cosine = jnp.einsum("bkd,bsd->bks", unit(prediction), state.context)
    written = jnp.arange(state.context.shape[1])[None, None, :] < state.num_committed[:, None, None]
    degeneration = jnp.max(jnp.where(written, cosine, -jnp.inf), axis=-1)
    confidence = jnp.exp(likeliest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    pick = jnp.argmax((1.0 - alpha) * confidence - alpha * degeneration, axis=-1).astype(jnp.int32)
    return _commit(state, logits, tokens, prediction, live, pick, ends)


def sample_steps(state: SamplingState, step: StepFunction, num_steps: int) -> tuple[SamplingState, SampledStep]:
    """`num_steps` of `step` as one scan; the fields of the returned SampledStep are [steps, B, …]."""
    return jax.lax.scan(lambda state, _: step(state), state, length=num_steps)


def _logits(model: LanguageModel, prediction: jax.Array) -> jax.Array:
    return model.logit_scale * scores(prediction, model.vocabulary.readout)


def _mark(seen: jax.Array, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Adds the `ids` [B, T] that are `valid` [B, T] to `seen` [B, V]."""
    batch, vocab_size = seen.shape
    return seen.at[jnp.arange(batch)[:, None], jnp.where(valid, ids, vocab_size)].set(True, mode="drop")


def _read(model: LanguageModel, forward: Forward, state: SamplingState, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
    """Predictions [B, k, d] after each of `tokens` [B, k] at position n, and their keys and values layer by layer.

    The k tokens are alternatives: each sees only the history and itself.
    """
    batch, count = tokens.shape
    positions = jnp.broadcast_to(state.num_committed[:, None], (batch, count))
    return forward(
        model.backbone, look_up(model.vocabulary.table, tokens), jnp.ones((batch, count)),
        jnp.zeros((batch,), jnp.int32), positions, mask=jnp.eye(count, dtype=bool)[None], history=state.history,
        num_visible=state.num_committed,
    )


def _commit(
    state: SamplingState, logits: jax.Array, tokens: jax.Array, prediction: jax.Array, live: KVCache, pick: jax.Array,
    ends: Ends,
) -> tuple[SamplingState, SampledStep]:
    """The state after choice `pick` [B] of `tokens` [B, k] was committed at position n, given the results of `_read`.

    A row that is done keeps its state; it writes at position n, after its end, and this is never read.
    """
    alive = ~state.done
    token = jnp.take_along_axis(tokens, pick[:, None], axis=1)
    ahead = jnp.take_along_axis(prediction, pick[:, None, None], axis=1)[:, 0]
    chosen = jax.tree.map(lambda x: jnp.take_along_axis(x, pick[:, None, None, None], axis=2), live)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token, axis=1)
    num_committed = state.num_committed + alive.astype(jnp.int32)
    after = SamplingState(
        num_committed=num_committed,
        prediction=jnp.where(alive[:, None], ahead, state.prediction),
        seen=_mark(state.seen, token, alive[:, None]),
        context=state.context.at[jnp.arange(pick.shape[0]), state.num_committed].set(unit(ahead)),
        key=state.key,
        budget=state.budget,
        done=state.done | is_end(token[:, 0], ends) | (num_committed >= state.budget),
        history=cache.append(state.history, chosen, state.num_committed[:, None]),
        text=state.text.at[jnp.arange(pick.shape[0]), state.num_committed].set(token[:, 0], mode="drop"),
    )
    return after, SampledStep(alive[:, None], token, log_prob)
