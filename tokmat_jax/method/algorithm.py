"""Algorithm 1 for a batch: predict, contract, commit, shift, in one `lax.scan` (METHOD §4).

                     predict(state)                 table
                          │ ẑ [B, K, d]               │
    tail z̃ ──► contract by η ──► front ──► nearest ──► token, fixed for good
      ▲                │                                │ e_x
      └── shift, embryo at the back                     └──► `recent`, the history

The decoder knows no model: `predict` maps a state to the tail's predictions and to its memory, state carried to the
next step (for a Transformer, the keys and values of the committed positions, `generation/cache.py`).

Controls beyond the plain algorithm are fields of `Tail`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.method import maturation
from tokmat_jax.method.ending import Ends, bar, is_end, up_to_end
from tokmat_jax.method.history import committed_vectors
from tokmat_jax.method.noise import embryos, fresh
from tokmat_jax.method.stability import Settling, settle, settled_run, unborn
from tokmat_jax.method.steering import steer
from tokmat_jax.method.table import Vocabulary, candidates, look_up, nearest_entropy, read
from tokmat_jax.method.tail import Tail
from tokmat_jax.method.verification import Drafts, choose_drafts, num_accepted


@struct.dataclass
class DecodeState:
    """State of a batch during decoding. Rows have nothing but K in common."""

    num_committed: jax.Array
    """n [B], committed positions, prompt included."""
    recent: jax.Array
    """Vectors at positions n − M .. n − 1 [B, M, d], the newest of the history; M is the maximum that a step commits.
    If n < M, the first ones are meaningless."""
    tail: jax.Array
    """z̃ [B, K, d], front first; slot j will take position n + j."""
    num_born: jax.Array
    """Number of embryos that each row has had [B]; the index of the next one's noise."""
    key: jax.Array
    """One key per row [B], on which alone its noise depends."""
    budget: jax.Array
    """[B], n at which a row stops."""
    done: jax.Array
    """[B] bool: the row has committed end-of-text or spent its budget, and no longer changes."""
    memory: Any
    """The memory that `predict` returned; for a Transformer the history's keys and values."""
    settling: Settling | None = None
    """For how many updates each slot's nearest token has not changed; None unless commits are stable."""
    pinned: jax.Array | None = None
    """Token [B, K] at which a slot is held until it is committed, −1 for a free slot; None if no slot is held."""
    nearest: jax.Array | None = None
    """Nearest token [B, K] of each slot, −1 for an embryo; None unless commits are verified."""
    text: jax.Array | None = None
    """Tokens [B, S] of the n committed positions; None unless drafts are looked up in them."""
    drafts: Drafts | None = None
    """Drafts that this pass checks; set only while `predict` is called, and only if commits are verified."""

    @property
    def last(self) -> jax.Array:
        """Vector at position n − 1 [B, d]."""
        return self.recent[:, -1]

    def places(self, count: int) -> jax.Array:
        """The positions n .. n + `count` − 1 [B, count]."""
        return self.num_committed[:, None] + jnp.arange(count)[None, :]

    def remaining(self, count: int) -> jax.Array:
        """How many tokens of the budget are left from each of these positions on [B, count]."""
        return self.budget[:, None] - self.places(count)


@struct.dataclass
class DecodeStep:
    """Result of one step. R slots are read: the front alone, or all K (`read_tail`, stable or verified commits)."""

    committed: jax.Array
    """Number of tokens [B] that the step committed, from the front on; 0 if the row was done."""
    tokens: jax.Array
    """Nearest tokens [B, R] after contraction; the first `committed` of them are fixed now."""
    entropy: jax.Array
    """[B, R] nats, at the temperature of `Tail`."""
    movement: jax.Array
    """‖Δz̃‖/R [B, R]."""
    candidates: jax.Array
    """The C nearest tokens [B, R, C] of each slot, nearest first; C = 0 unless they are asked for."""
    cosines: jax.Array
    """Their cosines with z̃ [B, R, C]."""
    vectors: jax.Array
    """z̃ [B, R, d] after contraction; d = 0 unless they are asked for."""
    drafts: jax.Array
    """Tokens [B, M] that the pass checked, −1 for none; M = 0 unless commits are verified."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step records for viewers; the default records the least."""

    read_tail: bool = False
    """Read all K slots, not the front alone."""
    num_candidates: int = 0
    """C, number of nearest tokens to record for each slot that is read."""
    keep_vectors: bool = False
    """Record z̃ of each slot that is read."""


Predict = Callable[[DecodeState], tuple[jax.Array, Any]]
"""DecodeState → (ẑ, memory). Without drafts, ẑ is [B, ≥ K, d]: the last K predictions are for the tail, those before
them for the newest committed positions. With M drafts, it is [B, 1 + M + K − 1, d]: for the front's position, for the M
positions after it (valid if the drafts before them are right), and for the slots after the front."""


def start_decoding(
    key: jax.Array, recent: jax.Array, num_committed: jax.Array, max_new_tokens: jax.Array, memory: Any, tail: Tail,
    radius: float, text: jax.Array | None = None,
) -> DecodeState:
    """The state after a prompt: K embryos, none of them refined.

    `key` [B] one per row, `recent` [B, M, d] the prompt's last vectors, as many as a step may commit,
    `num_committed` [B] its length, `max_new_tokens` [B] how many tokens each row may commit (0 = a row that is finished
    from the start), `text` [B, S] the prompts' tokens with room for new ones, if drafts are looked up.
    """
    (batch, _, size), tail_length = recent.shape, tail.maturity.shape[0]
    born = jnp.zeros_like(num_committed)
    return DecodeState(
        num_committed=num_committed,
        recent=recent,
        tail=embryos(key, born, tail_length, size, tail.noise, radius),
        num_born=born + tail_length,
        key=key,
        budget=num_committed + max_new_tokens,
        done=max_new_tokens <= 0,
        memory=memory,
        settling=None if tail.stability is None else unborn(batch, tail_length),
        nearest=None if tail.verification is None else jnp.full((batch, tail_length), -1, jnp.int32),
        text=text,
    )


def refine(state: DecodeState, prediction: jax.Array, vocabulary: Vocabulary, tail: Tail) -> jax.Array:
    """The tail [B, K, d] after one update: contracted towards the steered `prediction` [B, K, d], with fresh noise, and
    with pinned slots held at their tokens."""
    if tail.steering is not None:
        remaining = state.remaining(prediction.shape[1]).astype(jnp.float32)
        prediction = steer(prediction, remaining, tail.steering, vocabulary.radius)
    refined = maturation.contract(state.tail, prediction, tail.rate)
    if tail.fresh_noise is not None:
        slot = jnp.arange(refined.shape[1])
        committed = jnp.broadcast_to(state.num_committed[:, None], refined.shape[:2])
        refined = refined + fresh(state.key, committed, slot, tail.maturity, tail.fresh_noise, refined.shape[-1],
                                  vocabulary.radius)
    if state.pinned is not None:
        held = look_up(vocabulary.table, jnp.maximum(state.pinned, 0))
        refined = jnp.where((state.pinned >= 0)[..., None], held, refined)
    return refined


def commit(
    state: DecodeState, refined: jax.Array, memory: Any, tokens: jax.Array, count: jax.Array, vocabulary: Vocabulary,
    tail: Tail, ends: Ends,
) -> DecodeState:
    """The state after the first `count` [B] of `tokens` [B, M] have replaced as many front slots of `refined`
    [B, K, d]: shift and birth.

    A row that is done keeps its state, and its memory except for entries that it would write again; its count must
    be 0.
    """
    max_commit, size = tokens.shape[1], refined.shape[-1]
    alive = ~state.done
    born = embryos(state.key, state.num_born, max_commit, size, tail.noise, vocabulary.radius)
    entering = committed_vectors(look_up(vocabulary.table, tokens), state.last, state.key, state.num_committed,
                                 tail.entry, vocabulary.radius)
    num_committed = state.num_committed + count
    ended = jnp.any(is_end(tokens, ends) & (jnp.arange(max_commit)[None, :] < count[:, None]), axis=1)

    def shifted(slots, newborn):
        return maturation.shift(slots, jnp.full((slots.shape[0], max_commit), newborn), count)

    return DecodeState(
        num_committed=num_committed,
        recent=maturation.shift(state.recent, entering, count),
        tail=jnp.where(alive[:, None, None], maturation.shift(refined, born, count), state.tail),
        num_born=state.num_born + count,
        key=state.key,
        budget=state.budget,
        done=state.done | ended | (num_committed >= state.budget),
        memory=memory,
        settling=None if state.settling is None else Settling(
            shifted(state.settling.nearest, -1), shifted(state.settling.unchanged, 0)),
        pinned=None if state.pinned is None else shifted(state.pinned, -1),
        nearest=None if state.nearest is None else shifted(state.nearest, -1),
        text=None if state.text is None else _written(state.text, state.num_committed, tokens),
    )


def _written(text: jax.Array, first: jax.Array, tokens: jax.Array) -> jax.Array:
    """`text` [B, S] with `tokens` [B, M] at the positions from `first` [B] on; tokens that are not committed are
    overwritten before they are read."""
    rows = jnp.arange(text.shape[0])[:, None]
    return text.at[rows, first[:, None] + jnp.arange(tokens.shape[1])[None, :]].set(tokens, mode="drop")


def liquid_step(
    state: DecodeState, predict: Predict, vocabulary: Vocabulary, tail: Tail, ends: Ends,
    record: Record = Record(),
) -> tuple[DecodeState, DecodeStep]:
    """One step of Algorithm 1: every slot is refined, the front is committed, an embryo is born.

    With `Tail.stability`, all settled slots from the front on are committed, up to the M of `DecodeState.recent`. With
    `Tail.verification`, this is `verified_step`.
    """
    if tail.verification is not None:
        return verified_step(state, predict, vocabulary, tail, ends, record)
    length, max_commit = tail.maturity.shape[0], state.recent.shape[1]
    prediction, memory = predict(state)
    refined = refine(state, prediction[:, -length:], vocabulary, tail)
    shown = slice(None) if record.read_tail or tail.stability is not None else slice(0, 1)
    tokens, entropy = _said(refined[:, shown], state.remaining(length)[:, shown], vocabulary, tail, ends)
    tokens = _with_pins(state, tokens)
    moved = maturation.movement(state.tail[:, shown], refined[:, shown], vocabulary.radius)
    count = jnp.ones_like(state.num_committed)
    if tail.stability is not None and state.settling is not None:
        settling = settle(state.settling, tokens, state.done)
        state = dataclasses.replace(state, settling=settling)
        run = jnp.clip(settled_run(settling, moved, tail.stability), 1, max_commit)
        count = jnp.minimum(jnp.minimum(run, up_to_end(tokens[:, :max_commit], ends)),
                            state.budget - state.num_committed)
    count = jnp.where(state.done, 0, count)
    step = DecodeStep(count, tokens, entropy, moved,
                      *candidates(refined[:, shown], vocabulary, record.num_candidates),
                      refined[:, shown, : None if record.keep_vectors else 0],
                      jnp.zeros((len(refined), 0), jnp.int32))
    return commit(state, refined, memory, tokens[:, :max_commit], count, vocabulary, tail, ends), step


def verified_step(
    state: DecodeState, predict: Predict, vocabulary: Vocabulary, tail: Tail, ends: Ends,
    record: Record = Record(),
) -> tuple[DecodeState, DecodeStep]:
    """One pass that commits x_n and the drafts after it up to the first wrong one, and refines every slot.

    The committed tokens are those of immediate projection, each at its own position with its own noise, steering and
    pin. The returned step reads all K slots; committed slots show the committed tokens.
    """
    assert tail.verification is not None
    num_checked = tail.verification.num_drafts + 1
    tokens = choose_drafts(tail.verification, _with_pins(state, state.nearest), state.text, state.num_committed)
    entering = committed_vectors(look_up(vocabulary.table, jnp.maximum(tokens, 0)), state.last, state.key,
                                 state.num_committed, tail.entry, vocabulary.radius)
    prediction, memory = predict(dataclasses.replace(state, drafts=Drafts(tokens, entering)))
    of_slots = jnp.concatenate([prediction[:, :1], prediction[:, num_checked:]], axis=1)
    refined = refine(state, of_slots, vocabulary, tail)
    fronts = _fronts(state, prediction[:, :num_checked], vocabulary, tail)
    # The front is committed as `fronts` say, so its refined slot needs no reading.
    read_ones = jnp.concatenate([fronts, refined[:, 1:]], axis=1)
    remaining = jnp.concatenate([state.remaining(num_checked), state.remaining(refined.shape[1])[:, 1:]], axis=1)
    said, entropy = _said(read_ones, remaining, vocabulary, tail, ends)
    committed = _with_pins(state, said[:, :num_checked])
    nearest = _with_pins(state, jnp.concatenate([said[:, :1], said[:, num_checked:]], axis=1))
    entropy_of_slots = jnp.concatenate([entropy[:, :1], entropy[:, num_checked:]], axis=1)
    run = jnp.minimum(1 + num_accepted(tokens, committed), up_to_end(committed, ends))
    count = jnp.where(state.done, 0, jnp.minimum(run, state.budget - state.num_committed))

    def shown(of_fronts, of_slots):
        """The committed values, followed by those of the other slots."""
        padded = jnp.concatenate([of_fronts, of_slots[:, num_checked:]], axis=1)
        is_new = jnp.arange(of_slots.shape[1])[None, :] < count[:, None]
        return jnp.where(jnp.reshape(is_new, is_new.shape + (1,) * (of_slots.ndim - 2)), padded, of_slots)

    vectors = shown(fronts, refined)
    step = DecodeStep(
        count, shown(committed, nearest), shown(entropy[:, :num_checked], entropy_of_slots),
        maturation.movement(state.tail, vectors, vocabulary.radius),
        *candidates(vectors, vocabulary, record.num_candidates), vectors[..., : None if record.keep_vectors else 0],
        tokens)
    state = dataclasses.replace(state, nearest=nearest)
    return commit(state, refined, memory, committed, count, vocabulary, tail, ends), step


def _fronts(state: DecodeState, prediction: jax.Array, vocabulary: Vocabulary, tail: Tail) -> jax.Array:
    """Vectors to project [B, 1 + M, d] at n and the M positions after it: the `prediction` for each, with the steering
    and the noise of a front with η = 1 at that position."""
    if tail.steering is not None:
        front = dataclasses.replace(tail.steering, strength=tail.steering.strength[:1])
        remaining = state.remaining(prediction.shape[1]).astype(jnp.float32)
        prediction = steer(prediction, remaining, front, vocabulary.radius)
    if tail.fresh_noise is not None:
        front = jnp.zeros(prediction.shape[1], jnp.int32)
        prediction = prediction + fresh(state.key, state.places(prediction.shape[1]), front, tail.maturity[front],
                                        tail.fresh_noise, prediction.shape[-1], vocabulary.radius)
    return prediction


def _said(
    z: jax.Array, remaining: jax.Array, vocabulary: Vocabulary, tail: Tail, ends: Ends
) -> tuple[jax.Array, jax.Array]:
    """Nearest token and entropy [B, R] of slots `z` [B, R, d], from whose positions on `remaining` [B, R] tokens of the
    budget are left; `tail` says how the entropy is computed, and whether a sample may end there."""
    tokens, entropy = read(z, vocabulary, tail.temperature, bar(remaining, tail.ends_within, ends))
    if tail.entropy_candidates is not None:
        entropy = nearest_entropy(z, vocabulary, tail.entropy_candidates, tail.temperature)
    return tokens, entropy


def _with_pins(state: DecodeState, tokens: Any) -> Any:
    """`tokens` [B, R ≤ K] of the first R slots; in pinned slots, the pinned tokens."""
    if state.pinned is None or tokens is None:
        return tokens
    pinned = state.pinned[:, : tokens.shape[1]]
    return jnp.where(pinned >= 0, pinned, tokens)


def decode(
    state: DecodeState, predict: Predict, vocabulary: Vocabulary, tail: Tail, ends: Ends, num_steps: int,
    record: Record = Record(),
) -> tuple[DecodeState, DecodeStep]:
    """`num_steps` of `liquid_step` as one scan; the fields of the returned DecodeStep have a leading axis of steps,
    [steps, B, …]."""
    return jax.lax.scan(lambda state, _: liquid_step(state, predict, vocabulary, tail, ends, record), state,
                        length=num_steps)
