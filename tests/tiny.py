"""The small model that most tests share, and its parameters."""

import functools
from typing import Any

import jax
import numpy as np

from tokmat_jax.config import Config, DataConfig, GenerationConfig, MaturationConfig, ModelConfig, TrainConfig
from tokmat_jax.method.tail import Tail, make_tail
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import init_params, vocabulary_of

VOCAB = 61
CONFIG = Config(
    data=DataConfig(seq_len=48),
    model=ModelConfig(embed_dim=16, num_layers=2, num_heads=2),
    maturation=MaturationConfig(max_tail_length=16),
    train=TrainConfig(batch_size=4),
)


def shaken_params(config: Config = CONFIG, vocab_size: int = VOCAB, seed: int = 0):
    """Parameters in which nothing is zero any more, so that every input matters."""
    params = init_params(jax.random.key(seed), config, vocab_size)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    # Predictions about as long as R, as a trained head's are: errors are then in units of R.
    params["backbone"]["head"] = jax.tree.map(lambda x: 0.3 * x, params["backbone"]["head"])
    return params


def tail(length: int, direction: jax.Array | None = None, **settings: Any) -> Tail:
    """A tail of `length` slots with these GenerationConfig `settings`; steering draws to `direction` [d]."""
    return make_tail(GenerationConfig(tail_length=length, **settings), direction)


@functools.cache
def model(config: Config = CONFIG):
    """(backbone parameters, jitted forward, vocabulary) of the shaken model."""
    params = shaken_params(config)
    return params["backbone"], jax.jit(make_forward(config)), vocabulary_of(params, config)


@functools.cache
def padded_forward(config: Config = CONFIG):
    """A forward that fills its sequences up to the model's positions, so that it compiles once.

    Attention is causal and what fills up comes last, so that no output can depend on it.
    """
    forward = jax.jit(make_forward(config))
    size = config.max_positions

    def padded(params, z, maturity, tail_length, positions, mask):
        length = z.shape[1]
        room = size - length
        z = np.pad(z, ((0, 0), (0, room), (0, 0)))
        maturity, tail_length, positions = (  # K of a row stays as it is
            np.pad(x, ((0, 0), (0, room))) if x.ndim == 2 else x for x in (maturity, tail_length, positions))
        mask = np.pad(mask, ((0, 0), (0, room), (0, room))) | np.eye(size, dtype=bool)[None]
        output, live = forward(params, z, maturity, tail_length, positions, mask)
        return np.asarray(output)[:, :length], live

    return padded
