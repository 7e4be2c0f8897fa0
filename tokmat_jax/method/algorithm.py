"""Algorithm 1 for a batch: predict, contract, commit, shift, in one `lax.scan` (METHOD §4).

                     predict(state)                 table
                          │ ẑ [B, K, d]               │
    tail z̃ ──► contract by η ──► front ──► nearest ──► token, fixed for good
      ▲                │                                │ e_x
      └── shift, embryo at the back                     └──► `recent`, the history

The decoder knows no model: `predict` maps a state to the tail's predictions and to the memory it wants back at the
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
from tokmat_jax.method.history import committed_vectors
from tokmat_jax.method.noise import embryos, fresh
from tokmat_jax.method.stability import Settling, settle, settled_run, unborn, up_to_end
from tokmat_jax.method.steering import steer
from tokmat_jax.method.table import Vocabulary, candidates, look_up, read
from tokmat_jax.method.tail import Tail


@struct.dataclass
class DecodeState:
    """A batch in the middle of its sentence. Rows never have to agree about anything but K."""

    num_committed: jax.Array
    """n [B], committed positions, prompt included."""
    recent: jax.Array
    """Vectors at positions n − M .. n − 1 [B, M, d], the newest of the history; M is the most that a step commits.
    Where n < M the first ones mean nothing."""
    tail: jax.Array
    """z̃ [B, K, d], front first; slot j will take position n + j."""
    num_born: jax.Array
    """Embryos that each row has had [B]; numbers the next one's noise."""
    num_steps: jax.Array
    """Steps [] since the prompt; numbers the fresh noise."""
    key: jax.Array
    """One key per row [B]: nothing else decides a row's noise."""
    budget: jax.Array
    """[B], n at which a row stops."""
    done: jax.Array
    """[B] bool: the row has committed end-of-text or spent its budget and changes no more."""
    memory: Any
    """What `predict` returned; for a Transformer the history's keys and values."""
    settling: Settling | None = None
    """How long the slots have said what they say now; None where the front alone is committed."""
    pinned: jax.Array | None = None
    """Token [B, K] that a slot is held at until it is committed, −1 where it is free; None where no slot is held."""

    @property
    def last(self) -> jax.Array:
        """Vector at position n − 1 [B, d]."""
        return self.recent[:, -1]


@struct.dataclass
class DecodeStep:
    """What one step did. R slots are read: the front alone, or all K (`read_tail`, stable commits)."""

    committed: jax.Array
    """Tokens [B] that the step committed, from the front on; 0 where the row was done."""
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


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step keeps for those who watch; the default is the least."""

    read_tail: bool = False
    """Read all K slots, not the front alone."""
    num_candidates: int = 0
    """C, nearest tokens of each slot that is read."""
    keep_vectors: bool = False
    """Keep z̃ of each slot that is read."""


Predict = Callable[[DecodeState], tuple[jax.Array, Any]]
"""DecodeState → (ẑ [B, ≥ K, d], memory). The last K predictions are the tail's; those before them are of the newest
committed positions."""


def start_decoding(
    key: jax.Array, recent: jax.Array, num_committed: jax.Array, max_new_tokens: jax.Array, memory: Any, tail: Tail,
    radius: float,
) -> DecodeState:
    """A state behind a prompt: K embryos and nothing refined.

    `key` [B] one per row, `recent` [B, M, d] the prompt's last vectors, as many as a step may commit,
    `num_committed` [B] its length, `max_new_tokens` [B] how many tokens each row may commit (0 = a row that is finished
    from the start).
    """
    (batch, _, size), tail_length = recent.shape, tail.maturity.shape[0]
    born = jnp.zeros_like(num_committed)
    return DecodeState(
        num_committed=num_committed,
        recent=recent,
        tail=embryos(key, born, tail_length, size, tail.noise, radius),
        num_born=born + tail_length,
        num_steps=jnp.int32(0),
        key=key,
        budget=num_committed + max_new_tokens,
        done=max_new_tokens <= 0,
        memory=memory,
        settling=None if tail.stability is None else unborn(batch, tail_length),
    )


def refine(state: DecodeState, prediction: jax.Array, vocabulary: Vocabulary, tail: Tail) -> jax.Array:
    """The tail [B, K, d] one update later: steered, contracted towards `prediction` [B, K, d], disturbed, and held
    where it is pinned."""
    if tail.steering is not None:
        place = state.num_committed[:, None] + jnp.arange(tail.maturity.shape[0])[None, :]
        remaining = (state.budget[:, None] - place).astype(jnp.float32)
        prediction = steer(prediction, remaining, tail.steering, vocabulary.radius)
    refined = maturation.contract(state.tail, prediction, tail.rate)
    if tail.fresh_noise is not None:
        refined = refined + fresh(state.key, state.num_steps, tail.maturity, tail.fresh_noise, refined.shape[-1],
                                  vocabulary.radius)
    if state.pinned is not None:
        held = look_up(vocabulary.table, jnp.maximum(state.pinned, 0))
        refined = jnp.where((state.pinned >= 0)[..., None], held, refined)
    return refined


def commit(
    state: DecodeState, refined: jax.Array, memory: Any, tokens: jax.Array, count: jax.Array, vocabulary: Vocabulary,
    tail: Tail, end_of_text: int,
) -> DecodeState:
    """The state after the first `count` [B] of `tokens` [B, M] took the places of as many fronts of `refined`
    [B, K, d]: shift and birth.

    A row that is done keeps its state, memory included up to what it would write again; its count must be 0.
    """
    max_commit, size = tokens.shape[1], refined.shape[-1]
    alive = ~state.done
    born = embryos(state.key, state.num_born, max_commit, size, tail.noise, vocabulary.radius)
    entering = committed_vectors(look_up(vocabulary.table, tokens), state.last, state.key, state.num_committed,
                                 tail.entry, vocabulary.radius)
    num_committed = state.num_committed + count
    ended = jnp.any((tokens == end_of_text) & (jnp.arange(max_commit)[None, :] < count[:, None]), axis=1)

    def shifted(slots, newborn):
        return maturation.shift(slots, jnp.full((slots.shape[0], max_commit), newborn), count)

    return DecodeState(
        num_committed=num_committed,
        recent=maturation.shift(state.recent, entering, count),
        tail=jnp.where(alive[:, None, None], maturation.shift(refined, born, count), state.tail),
        num_born=state.num_born + count,
        num_steps=state.num_steps + 1,
        key=state.key,
        budget=state.budget,
        done=state.done | ended | (num_committed >= state.budget),
        memory=memory,
        settling=None if state.settling is None else Settling(
            shifted(state.settling.nearest, -1), shifted(state.settling.unchanged, 0)),
        pinned=None if state.pinned is None else shifted(state.pinned, -1),
    )


def liquid_step(
    state: DecodeState, predict: Predict, vocabulary: Vocabulary, tail: Tail, end_of_text: int,
    record: Record = Record(),
) -> tuple[DecodeState, DecodeStep]:
    """One step of Algorithm 1: every slot is refined, the front is committed, an embryo is born.

    With `Tail.stability` as much as has settled is committed, up to the M of `DecodeState.recent`.
    """
    length, max_commit = tail.maturity.shape[0], state.recent.shape[1]
    prediction, memory = predict(state)
    refined = refine(state, prediction[:, -length:], vocabulary, tail)
    shown = slice(None) if record.read_tail or tail.stability is not None else slice(0, 1)
    tokens, entropy = read(refined[:, shown], vocabulary, tail.temperature)
    if state.pinned is not None:
        tokens = jnp.where(state.pinned[:, shown] >= 0, state.pinned[:, shown], tokens)
    moved = maturation.movement(state.tail[:, shown], refined[:, shown], vocabulary.radius)
    count = jnp.ones_like(state.num_committed)
    if tail.stability is not None and state.settling is not None:
        settling = settle(state.settling, tokens, state.done)
        state = dataclasses.replace(state, settling=settling)
        run = jnp.clip(settled_run(settling, moved, tail.stability), 1, max_commit)
        count = jnp.minimum(jnp.minimum(run, up_to_end(tokens[:, :max_commit], end_of_text)),
                            state.budget - state.num_committed)
    count = jnp.where(state.done, 0, count)
    step = DecodeStep(count, tokens, entropy, moved,
                      *candidates(refined[:, shown], vocabulary, record.num_candidates),
                      refined[:, shown, : None if record.keep_vectors else 0])
    return commit(state, refined, memory, tokens[:, :max_commit], count, vocabulary, tail, end_of_text), step


def decode(
    state: DecodeState, predict: Predict, vocabulary: Vocabulary, tail: Tail, end_of_text: int, num_steps: int,
    record: Record = Record(),
) -> tuple[DecodeState, DecodeStep]:
    """`num_steps` of `liquid_step` as one scan; the fields of the DecodeStep returned lead with the step,
    [steps, B, …]."""
    return jax.lax.scan(lambda state, _: liquid_step(state, predict, vocabulary, tail, end_of_text, record), state,
                        length=num_steps)
