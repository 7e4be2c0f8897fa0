"""The compiled programs of a model with a liquid tail: read prompts, continue them, read ids."""

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from tokmat_jax.config import ComputeConfig, Config
from tokmat_jax.generation import cache
from tokmat_jax.generation.batches import sample_key
from tokmat_jax.method.algorithm import DecodeState, DecodeStep, Record, decode, start_decoding
from tokmat_jax.method.ending import Ends
from tokmat_jax.method.table import Vocabulary, look_up, read
from tokmat_jax.method.tail import Tail
from tokmat_jax.model.backbone import Forward, Params, make_forward, unstack_blocks


@dataclass(frozen=True, eq=False)  # equal instances would share a `jax.jit` cache, and the counts would be wrong
class Programs:
    """The programs of one config, each compiled once per shape. Parameters are arguments: new ones need no
    compilation."""

    config: Config
    ends: Ends
    """Tokens that end a sample."""
    traced: Counter[str] = field(default_factory=Counter, init=False)
    """Number of compilations of each program."""

    @functools.cached_property
    def prefill(self):
        """(params, vocabulary, ids, lengths, budgets, names, tail, capacity, max_commit) → state after the prompts."""
        return jax.jit(self._prefill, static_argnames=("capacity", "max_commit"))

    @functools.cached_property
    def advance(self):
        """(params, vocabulary, state, tail, num_steps, record) → (state, DecodeStep); the given state is donated."""
        return jax.jit(self._advance, static_argnames=("num_steps", "record"), donate_argnames="state")

    @functools.cached_property
    def step(self):
        """As `advance`. The state is not donated: callers may step from the same state more than once."""
        return jax.jit(self._advance, static_argnames=("num_steps", "record"))

    @functools.cached_property
    def read(self):
        """(params, vocabulary, ids [B, P]) → [B, P], the nearest token to the prediction after every prefix."""
        return jax.jit(self._read)

    @functools.cached_property
    def _forward(self) -> Forward:
        # Generation must run on any machine, whichever kernel the model was trained with.
        return make_forward(dataclasses.replace(self.config, compute=ComputeConfig()))

    def _prefill(
        self, params: Params, vocabulary: Vocabulary, ids: jax.Array, lengths: jax.Array, budgets: jax.Array,
        names: jax.Array, tail: Tail, capacity: int, max_commit: int,
    ) -> DecodeState:
        self.traced["prefill"] += 1
        tail_length = jnp.full(lengths.shape, tail.model_tail_length)
        vectors = look_up(vocabulary.table, ids)
        model = functools.partial(self._forward, params)
        room = cache.room_of(self.config.model, capacity, cache.written_at_once(tail, max_commit))
        memory = cache.prefill(model, vectors, tail_length, lengths, room, tail.repulsion is not None)
        newest = lengths[:, None] - max_commit + jnp.arange(max_commit)[None, :]
        recent = jnp.take_along_axis(vectors, jnp.maximum(newest, 0)[:, :, None], axis=1)
        looks_up = tail.verification is not None and tail.verification.draft != "tail"
        text = jnp.pad(ids, ((0, 0), (0, capacity - ids.shape[1]))) if looks_up else None
        return start_decoding(jax.vmap(sample_key)(names), recent, lengths, budgets, memory, tail, vocabulary.radius,
                              text)

    def _advance(
        self, params: Params, vocabulary: Vocabulary, state: DecodeState, tail: Tail, num_steps: int, record: Record
    ) -> tuple[DecodeState, DecodeStep]:
        self.traced["advance"] += 1
        model = functools.partial(self._forward, unstack_blocks(params))  # once for all steps of the scan
        predict = cache.cached_predict(model, tail)
        return decode(state, predict, vocabulary, tail, self.ends, num_steps, record)

    def _read(self, params: Params, vocabulary: Vocabulary, ids: jax.Array) -> jax.Array:
        self.traced["read"] += 1
        batch, width = ids.shape
        positions = jnp.broadcast_to(jnp.arange(width)[None, :], ids.shape)
        prediction, _ = self._forward(params, look_up(vocabulary.table, ids), jnp.ones(ids.shape),
                                      jnp.zeros((batch,), jnp.int32), positions)
        return read(prediction, vocabulary, 1.0)[0]
