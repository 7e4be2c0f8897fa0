"""Algorithm 1 for a batch: predict, contract, commit, shift, in one `lax.scan` (METHOD §4).

                     predict(state)                 table
                          │ ẑ [B, K, d]               │
    tail z̃ ──► contract by η ──► front ──► nearest ──► token, fixed for good
      ▲                │                                │ e_x
      └── shift, embryo at the back                     └──► `last`, the history

The decoder knows no model: `predict` maps a state to the tail's predictions and to the memory it wants back at the
next step (for a Transformer, the keys and values of the committed positions, `cache.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax import maturation
from tokmat_jax.config import Profile
from tokmat_jax.table import Vocabulary, candidates, look_up, read

_HISTORY = 2**32 - 1
"""Numbers the key of the history's noise; embryos never get that far."""


@struct.dataclass
class Tail:
    """How the tail is run; a pytree of numbers, so that another value compiles nothing."""

    maturity: jax.Array
    """α [K], front first, in [0, 1]."""
    rate: jax.Array
    """η [K], front first, in [0, 1]."""
    noise: jax.Array
    """σ [], norm of the embryos in units of R."""
    guidance_scale: jax.Array
    """s []; 1 is off."""
    temperature: jax.Array
    """τ [] of the entropy that is reported."""
    history_noise: jax.Array
    """σ_h [], norm in units of R of what is added to a vector when it enters the history; 0 is off."""
    repulsion: jax.Array
    """ρ [], strength of the push away from what was committed in like places, as a share of ‖ẑ‖; 0 is off."""
    repulsion_sharpness: jax.Array
    """b [], how alike two predictions must be to count as the same place."""


def make_tail(
    tail_length: int,
    profile: Profile = "linear",
    max_maturity: float = 0.9,
    noise: float = 0.3,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    rate: float | None = None,
    history_noise: float = 0.0,
    repulsion: float = 0.0,
    repulsion_sharpness: float = 10.0,
) -> Tail:
    """The settings of a tail of `tail_length` K; the plain algorithm's where they are left out.

    `rate` is η of the front slot, and the others fall off as the profile does; None is the plain η_j = α_j.
    """

    def along(front):
        return maturation.profile_maturity(
            jnp.arange(tail_length), jnp.int32(tail_length), profile, jnp.float32(front))

    return Tail(along(max_maturity), along(max_maturity if rate is None else rate), jnp.float32(noise),
                jnp.float32(guidance_scale), jnp.float32(temperature), jnp.float32(history_noise),
                jnp.float32(repulsion), jnp.float32(repulsion_sharpness))


@struct.dataclass
class State:
    """A batch in the middle of its sentence. Rows never have to agree about anything but K."""

    num_committed: jax.Array
    """n [B], committed positions, prompt included."""
    last: jax.Array
    """Vector at position n − 1 [B, d], the newest of the history."""
    tail: jax.Array
    """z̃ [B, K, d], front first; slot j will take position n + j."""
    num_born: jax.Array
    """Embryos that each row has had [B]; numbers the next one's noise."""
    key: jax.Array
    """One key per row [B]: nothing else decides a row's noise."""
    budget: jax.Array
    """[B], n at which a row stops."""
    done: jax.Array
    """[B] bool: the row has committed end-of-text or spent its budget and changes no more."""
    memory: Any
    """What `predict` returned; for a Transformer the history's keys and values."""


@struct.dataclass
class Step:
    """What one step did. R slots are read: the front alone, or all K (`read_tail`)."""

    emitted: jax.Array
    """[B] bool: the row was alive, so that its front was committed."""
    tokens: jax.Array
    """Nearest tokens [B, R] after contraction; slot 0 is the one committed."""
    entropy: jax.Array
    """[B, R] nats, at the temperature of `Tail`."""
    movement: jax.Array
    """‖Δz̃‖/R [B, R]."""
    candidates: jax.Array
    """The C nearest tokens [B, R, C] of each slot, nearest first; C = 0 unless they are asked for."""
    cosines: jax.Array
    """Their cosines with z̃ [B, R, C]."""


Predict = Callable[[State], tuple[jax.Array, Any]]


def embryos(key: jax.Array, first: jax.Array, count: int, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """The embryos number `first`.. of each row [B, count, d]: number i of a row depends on its key and i alone."""

    def row(key, first):
        numbers = first + jnp.arange(count)
        return jax.vmap(
            lambda number: maturation.noise_vector(jax.random.fold_in(key, number), (embed_dim,), noise, radius)
        )(numbers)

    return jax.vmap(row)(key, first)


def start(
    key: jax.Array, last: jax.Array, num_committed: jax.Array, max_new_tokens: jax.Array, memory: Any,
    tail: Tail, radius: float,
) -> State:
    """A state behind a prompt: K embryos and nothing refined.

    `key` [B] one per row, `last` [B, d] the prompt's last vector, `num_committed` [B] its length,
    `max_new_tokens` [B] how many tokens each row may commit (0 = a row that is finished from the start).
    """
    tail_length = tail.maturity.shape[0]
    born = jnp.zeros_like(num_committed)
    return State(
        num_committed=num_committed,
        last=last,
        tail=embryos(key, born, tail_length, last.shape[-1], tail.noise, radius),
        num_born=born + tail_length,
        key=key,
        budget=num_committed + max_new_tokens,
        done=max_new_tokens <= 0,
        memory=memory,
    )


def commit(
    state: State, refined: jax.Array, memory: Any, tokens: jax.Array, vocabulary: Vocabulary, tail: Tail,
    radius: float, end_of_text: int,
) -> State:
    """The state after `tokens` [B] took the place of the fronts of `refined` [B, K, d]: shift and birth.

    A row that is done keeps its state, memory included up to what it would write again.
    """
    alive = ~state.done
    one = alive.astype(jnp.int32)
    size = refined.shape[-1]
    embryo = embryos(state.key, state.num_born, 1, size, tail.noise, radius)[:, 0]
    entering = look_up(vocabulary.table, tokens) + history_noise(state.key, state.num_committed, size, tail, radius)
    num_committed = state.num_committed + one
    return State(
        num_committed=num_committed,
        last=jnp.where(alive[:, None], entering, state.last),
        tail=jnp.where(alive[:, None, None], maturation.shift(refined, embryo), state.tail),
        num_born=state.num_born + one,
        key=state.key,
        budget=state.budget,
        done=state.done | (tokens == end_of_text) | (num_committed >= state.budget),
        memory=memory,
    )


def history_noise(key: jax.Array, position: jax.Array, embed_dim: int, tail: Tail, radius: float) -> jax.Array:
    """σ_h R ε/√d [B, d] for vectors that enter the history at `position` [B] of rows with `key` [B] (METHOD §4).

    Drawn once per position, so that a cache of what was computed from the vector stays exact.
    """

    def row(key, position):
        key = jax.random.fold_in(jax.random.fold_in(key, _HISTORY), position)
        return maturation.noise_vector(key, (embed_dim,), tail.history_noise, radius)

    return jax.vmap(row)(key, position)


def liquid_step(
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    read_tail: bool = False, num_candidates: int = 0,
) -> tuple[State, Step]:
    """One step of Algorithm 1: every slot is refined, the front is committed, an embryo is born."""
    prediction, memory = predict(state)
    refined = maturation.contract(state.tail, prediction, tail.rate)
    shown = slice(None) if read_tail else slice(0, 1)
    tokens, entropy = read(refined[:, shown], vocabulary, tail.temperature)
    moved = maturation.movement(state.tail[:, shown], refined[:, shown], radius)
    step = Step(~state.done, tokens, entropy, moved, *candidates(refined[:, shown], vocabulary, num_candidates))
    return commit(state, refined, memory, tokens[:, 0], vocabulary, tail, radius, end_of_text), step


def run(
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    num_steps: int, read_tail: bool = False, num_candidates: int = 0,
) -> tuple[State, Step]:
    """`num_steps` of `liquid_step` as one scan; the fields of the Step returned lead with the step, [steps, B, …]."""

    def body(state, _):
        return liquid_step(state, predict, vocabulary, tail, radius, end_of_text, read_tail, num_candidates)

    return jax.lax.scan(body, state, length=num_steps)
