"""Algorithm 1 for a batch: predict, contract, commit, shift, in one `lax.scan` (METHOD §4).

                     predict(state)                 table
                          │ ẑ [B, K, d]               │
    tail z̃ ──► contract by η ──► front ──► nearest ──► token, fixed for good
      ▲                │                                │ e_x
      └── shift, embryo at the back                     └──► `recent`, the history

The decoder knows no model: `predict` maps a state to the tail's predictions and to the memory it wants back at the
next step (for a Transformer, the keys and values of the committed positions, `cache.py`).

Every control beyond the plain algorithm is None in `Tail` where it is off, so that it costs nothing and leaves the
plain algorithm bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tokmat_jax.config import Profile
from tokmat_jax.method import maturation
from tokmat_jax.method.history import enter
from tokmat_jax.method.stability import Settling, Stability, settle, settled_run, unborn, up_to_end
from tokmat_jax.method.steering import Steering, steer
from tokmat_jax.method.table import Vocabulary, candidates, look_up, read

_FRESH = 2**32 - 2
"""Numbers the key of the fresh noise; embryos never get that far."""


@struct.dataclass
class Tail:
    """How the tail is run; a pytree of numbers, so that another value compiles nothing."""

    maturity: jax.Array
    """α [K], front first, in [0, 1]."""
    rate: jax.Array
    """η [K], front first, in [0, 1]."""
    noise: jax.Array
    """σ [], norm of the embryos in units of R."""
    temperature: jax.Array
    """τ [] of the entropy that is reported."""
    guidance_scale: jax.Array | None = None
    """s []."""
    repulsion: jax.Array | None = None
    """ρ [], strength of the push away from what was committed in like places, as a share of ‖ẑ‖."""
    repulsion_sharpness: jax.Array | None = None
    """b [], how alike two predictions must be to count as the same place."""
    steering: Steering | None = None
    """Where predictions are drawn to."""
    fresh_noise: jax.Array | None = None
    """σ_f [], norm in units of R of what is added to a slot of maturity 0 at every step; 1 − α of it to others."""
    history_noise: jax.Array | None = None
    """σ_h [], norm in units of R of what is added to a vector when it enters the history."""
    history_smoothing: jax.Array | None = None
    """h [] in [0, 1), share of the vector before it in a vector that enters the history."""
    stability: Stability | None = None
    """When slots have settled; None commits the front alone."""


def make_tail(
    tail_length: int,
    profile: Profile = "linear",
    max_maturity: float = 0.9,
    noise: float = 0.3,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    rate: float | tuple[float, ...] | None = None,
    history_noise: float = 0.0,
    repulsion: float = 0.0,
    repulsion_sharpness: float = 10.0,
    fresh_noise: float = 0.0,
    history_smoothing: float = 0.0,
    steering: Steering | None = None,
    stability: Stability | None = None,
) -> Tail:
    """The settings of a tail of `tail_length` K; the plain algorithm's where they are left out.

    `rate` is η of the front slot, and the others fall off as the profile does; or one number per slot; None is the
    plain η_j = α_j. A neutral value (s = 1, no noise, …) becomes None.
    """

    def along(front):
        return maturation.profile_maturity(
            jnp.arange(tail_length), jnp.int32(tail_length), profile, jnp.float32(front))

    def unless(neutral, value):
        return None if value == neutral else jnp.float32(value)

    front = max_maturity if rate is None else rate
    own_rate = jnp.array(front, jnp.float32) if isinstance(front, tuple) else along(front)
    return Tail(
        along(max_maturity), own_rate, jnp.float32(noise), jnp.float32(temperature),
        guidance_scale=unless(1.0, guidance_scale), repulsion=unless(0.0, repulsion),
        repulsion_sharpness=jnp.float32(repulsion_sharpness) if repulsion else None, steering=steering,
        fresh_noise=unless(0.0, fresh_noise), history_noise=unless(0.0, history_noise),
        history_smoothing=unless(0.0, history_smoothing), stability=stability)


@struct.dataclass
class State:
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
class Step:
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


Predict = Callable[[State], tuple[jax.Array, Any]]
"""State → (ẑ [B, ≥ K, d], memory). The last K predictions are the tail's; those before them are of the newest
committed positions."""


def embryos(key: jax.Array, first: jax.Array, count: int, embed_dim: int, noise: jax.Array, radius: float) -> jax.Array:
    """The embryos number `first`.. of each row [B, count, d]: number i of a row depends on its key and i alone."""

    def row(key, first):
        numbers = first + jnp.arange(count)
        return jax.vmap(
            lambda number: maturation.noise_vector(jax.random.fold_in(key, number), (embed_dim,), noise, radius)
        )(numbers)

    return jax.vmap(row)(key, first)


def fresh(key: jax.Array, step: jax.Array, tail: Tail, embed_dim: int, radius: float) -> jax.Array:
    """(1 − α_j) σ_f R ε/√d [B, K, d] of step number `step` [] for rows with `key` [B]."""
    maturity, noise = tail.maturity, tail.fresh_noise
    assert noise is not None

    def row(key):
        key = jax.random.fold_in(jax.random.fold_in(key, _FRESH), step)
        return maturation.noise_vector(key, (maturity.shape[0], embed_dim), noise, radius)

    return (1.0 - maturity)[None, :, None] * jax.vmap(row)(key)


def start(
    key: jax.Array, recent: jax.Array, num_committed: jax.Array, max_new_tokens: jax.Array, memory: Any,
    tail: Tail, radius: float,
) -> State:
    """A state behind a prompt: K embryos and nothing refined.

    `key` [B] one per row, `recent` [B, M, d] the prompt's last vectors, as many as a step may commit,
    `num_committed` [B] its length, `max_new_tokens` [B] how many tokens each row may commit (0 = a row that is finished
    from the start).
    """
    (batch, _, size), tail_length = recent.shape, tail.maturity.shape[0]
    born = jnp.zeros_like(num_committed)
    return State(
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


def refine(state: State, prediction: jax.Array, vocabulary: Vocabulary, tail: Tail, radius: float) -> jax.Array:
    """The tail [B, K, d] one update later: steered, contracted towards `prediction` [B, K, d], disturbed, and held
    where it is pinned."""
    if tail.steering is not None:
        place = state.num_committed[:, None] + jnp.arange(tail.maturity.shape[0])[None, :]
        remaining = (state.budget[:, None] - place).astype(jnp.float32)
        prediction = steer(prediction, remaining, tail.steering, radius)
    refined = maturation.contract(state.tail, prediction, tail.rate)
    if tail.fresh_noise is not None:
        refined = refined + fresh(state.key, state.num_steps, tail, refined.shape[-1], radius)
    if state.pinned is not None:
        held = look_up(vocabulary.table, jnp.maximum(state.pinned, 0))
        refined = jnp.where((state.pinned >= 0)[..., None], held, refined)
    return refined


def commit(
    state: State, refined: jax.Array, memory: Any, tokens: jax.Array, count: jax.Array, vocabulary: Vocabulary,
    tail: Tail, radius: float, end_of_text: int,
) -> State:
    """The state after the first `count` [B] of `tokens` [B, M] took the places of as many fronts of `refined`
    [B, K, d]: shift and birth.

    A row that is done keeps its state, memory included up to what it would write again; its count must be 0.
    """
    most, size = tokens.shape[1], refined.shape[-1]
    alive = ~state.done
    born = embryos(state.key, state.num_born, most, size, tail.noise, radius)
    entering = enter(look_up(vocabulary.table, tokens), state.last, state.key, state.num_committed, tail.history_noise,
                     tail.history_smoothing, radius)
    num_committed = state.num_committed + count
    ended = jnp.any((tokens == end_of_text) & (jnp.arange(most)[None, :] < count[:, None]), axis=1)

    def shifted(slots, newborn):
        return maturation.shift(slots, jnp.full((slots.shape[0], most), newborn), count)

    return State(
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
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    read_tail: bool = False, num_candidates: int = 0, keep_vectors: bool = False,
) -> tuple[State, Step]:
    """One step of Algorithm 1: every slot is refined, the front is committed, an embryo is born.

    With `Tail.stability` as much as has settled is committed, up to the M of `State.recent`.
    """
    length, most = tail.maturity.shape[0], state.recent.shape[1]
    prediction, memory = predict(state)
    refined = refine(state, prediction[:, -length:], vocabulary, tail, radius)
    shown = slice(None) if read_tail or tail.stability is not None else slice(0, 1)
    tokens, entropy = read(refined[:, shown], vocabulary, tail.temperature)
    if state.pinned is not None:
        tokens = jnp.where(state.pinned[:, shown] >= 0, state.pinned[:, shown], tokens)
    moved = maturation.movement(state.tail[:, shown], refined[:, shown], radius)
    count = jnp.ones_like(state.num_committed)
    if tail.stability is not None and state.settling is not None:
        settling = settle(state.settling, tokens, state.done)
        state = dataclasses.replace(state, settling=settling)
        run = jnp.clip(settled_run(settling, moved, tail.stability), 1, most)
        count = jnp.minimum(jnp.minimum(run, up_to_end(tokens[:, :most], end_of_text)),
                            state.budget - state.num_committed)
    count = jnp.where(state.done, 0, count)
    step = Step(count, tokens, entropy, moved, *candidates(refined[:, shown], vocabulary, num_candidates),
                refined[:, shown, : None if keep_vectors else 0])
    return commit(state, refined, memory, tokens[:, :most], count, vocabulary, tail, radius, end_of_text), step


def run(
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    num_steps: int, read_tail: bool = False, num_candidates: int = 0, keep_vectors: bool = False,
) -> tuple[State, Step]:
    """`num_steps` of `liquid_step` as one scan; the fields of the Step returned lead with the step, [steps, B, …]."""

    def body(state, _):
        return liquid_step(state, predict, vocabulary, tail, radius, end_of_text, read_tail, num_candidates,
                           keep_vectors)

    return jax.lax.scan(body, state, length=num_steps)
