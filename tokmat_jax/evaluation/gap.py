"""Train–inference gap: the loss on simulated tails compared to the loss on real tails of the decoder.

On both sides the history is the true text, and positions, slots, maturities and targets are the same. Only the content
of the slots differs: α e + (1 − α) noise in training, the model's own refinements of embryos in decoding.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import Config, GenerationConfig
from tokmat_jax.generation import cache
from tokmat_jax.keys import seed_key
from tokmat_jax.method import losses, maturation
from tokmat_jax.method.algorithm import commit, start_decoding
from tokmat_jax.method.noise import embryos
from tokmat_jax.method.table import look_up, scores
from tokmat_jax.method.tail import Tail, make_tail
from tokmat_jax.model.backbone import Params, make_forward
from tokmat_jax.model.params import logit_scale_of, vocabulary_of


@dataclass(frozen=True)
class Gap:
    """Results by slot, front first; arrays [K]."""

    maturity: np.ndarray
    simulated_loss: np.ndarray
    """InfoNCE against all of V on simulated tails, nats."""
    real_loss: np.ndarray
    """InfoNCE against all of V on real tails, nats."""
    simulated_top1: np.ndarray
    """Share of predictions whose nearest token is the target, on simulated tails."""
    real_top1: np.ndarray
    count: int
    """Number of predictions per slot."""


def measure_gap(
    params: Params, config: Config, ids: np.ndarray, prompt_tokens: int, tail_length: int, seed: int = 0
) -> Gap:
    """Moves the tail along the true text of windows `ids` [B, T], starting after `prompt_tokens` ids.

    Each step measures the K predictions on both tails and then commits the true token. Maturities, rates and noise are
    those of training. The first K steps, in which the tail fills up, do not count; T must be long enough for more
    steps.
    """
    batch, length = ids.shape
    num_steps = length - prompt_tokens - tail_length + 1
    keys = jax.vmap(lambda row: jax.random.fold_in(seed_key(seed), row))(jnp.arange(batch))
    sums = _sums(params, jnp.asarray(ids), keys, config, prompt_tokens, tail_length, num_steps)
    kept = np.asarray(sums)[tail_length:].sum(0) / (batch * (num_steps - tail_length))
    maturity = _training_tail(config, tail_length).maturity
    return Gap(np.asarray(maturity), *kept, count=batch * (num_steps - tail_length))


def _training_tail(config: Config, tail_length: int) -> Tail:
    """A tail with the maturities, rates and noise that training simulates."""
    settings = config.maturation
    return make_tail(GenerationConfig(tail_length=tail_length, profile=settings.profile,
                                      max_maturity=settings.max_maturity, tail_noise=settings.tail_noise))


@functools.partial(jax.jit, static_argnames=("config", "prompt_tokens", "tail_length", "num_steps"))
def _sums(params, ids, keys, config: Config, prompt_tokens: int, tail_length: int, num_steps: int) -> jax.Array:
    """Sums over rows by step [num_steps, 4, K]: loss simulated, loss real, hits simulated, hits real."""
    model, vocabulary = functools.partial(make_forward(config), params["backbone"]), vocabulary_of(params, config)
    tail, radius = _training_tail(config, tail_length), vocabulary.radius
    predict = cache.cached_predict(model, tail)
    scale = logit_scale_of(params, config)
    batch, length = ids.shape
    vectors = look_up(vocabulary.table, ids)
    rows = jnp.full((batch,), tail_length, jnp.int32)
    at = jnp.full((batch,), prompt_tokens, jnp.int32)
    memory = cache.prefill(model, vectors[:, :prompt_tokens], rows, at, cache.room_of(config.model, length, 1))
    state = start_decoding(keys, vectors[:, prompt_tokens - 1 : prompt_tokens], at, jnp.full((batch,), length), memory,
                           tail, radius)

    def body(state, _):
        slots = state.num_committed[:, None] + jnp.arange(tail_length)[None, :]
        targets = jnp.take_along_axis(ids, slots, axis=1)
        prediction, memory = predict(state)
        # Numbers that no embryo of this rollout uses.
        noise = embryos(state.key, state.num_born + length, tail_length, vectors.shape[-1], tail.noise, radius)
        told = jnp.broadcast_to(tail.maturity[None, :], targets.shape)
        simulated = state.replace(tail=maturation.corrupt(look_up(vocabulary.table, targets), noise, told))
        pair = (predict(simulated)[0], prediction)
        measured = [jnp.sum(part(one, targets), axis=0) for part in (loss, hit) for one in pair]
        refined = maturation.contract(state.tail, prediction, tail.rate)
        following = commit(state, refined, memory, targets[:, :1], jnp.ones((batch,), jnp.int32), vocabulary,
                           tail, ends=())
        return following, jnp.stack(measured)

    def loss(prediction, targets):
        everything = losses.all_of(vocabulary.table.shape[0])
        return losses.info_nce(prediction, targets, vocabulary.table, everything, scale)

    def hit(prediction, targets):
        nearest = jnp.argmax(scores(prediction, vocabulary.readout), axis=-1)
        return (nearest == targets).astype(jnp.float32)

    return jax.lax.scan(body, state, length=num_steps)[1]
