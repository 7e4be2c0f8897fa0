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
from tokmat_jax.table import Vocabulary, look_up, read


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


def make_tail(
    tail_length: int,
    profile: Profile = "linear",
    max_maturity: float = 0.9,
    noise: float = 0.3,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tail:
    """The plain algorithm's settings: the rate of a slot is its maturity (η_j = α_j)."""
    slots = jnp.arange(tail_length)
    maturity = maturation.profile_maturity(slots, jnp.int32(tail_length), profile, jnp.float32(max_maturity))
    return Tail(maturity, maturity, jnp.float32(noise), jnp.float32(guidance_scale), jnp.float32(temperature))


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


def liquid_step(
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    read_tail: bool = False,
) -> tuple[State, Step]:
    """One step of Algorithm 1: every slot is refined, the front is committed, an embryo is born.

    A row that is done keeps its state, memory included up to what it would write again.
    """
    prediction, memory = predict(state)
    refined = maturation.contract(state.tail, prediction, tail.rate)
    shown = slice(None) if read_tail else slice(0, 1)
    tokens, entropy = read(refined[:, shown], vocabulary, tail.temperature)
    moved = maturation.movement(state.tail[:, shown], refined[:, shown], radius)

    alive = ~state.done
    one = alive.astype(jnp.int32)
    committed = tokens[:, 0]
    embryo = embryos(state.key, state.num_born, 1, refined.shape[-1], tail.noise, radius)[:, 0]
    num_committed = state.num_committed + one
    following = State(
        num_committed=num_committed,
        last=jnp.where(alive[:, None], look_up(vocabulary.table, committed), state.last),
        tail=jnp.where(alive[:, None, None], maturation.shift(refined, embryo), state.tail),
        num_born=state.num_born + one,
        key=state.key,
        budget=state.budget,
        done=state.done | (committed == end_of_text) | (num_committed >= state.budget),
        memory=memory,
    )
    return following, Step(alive, tokens, entropy, moved)


def run(
    state: State, predict: Predict, vocabulary: Vocabulary, tail: Tail, radius: float, end_of_text: int,
    num_steps: int, read_tail: bool = False,
) -> tuple[State, Step]:
    """`num_steps` of `liquid_step` as one scan; the fields of the Step returned lead with the step, [steps, B, …]."""

    def body(state, _):
        return liquid_step(state, predict, vocabulary, tail, radius, end_of_text, read_tail)

    return jax.lax.scan(body, state, length=num_steps)
