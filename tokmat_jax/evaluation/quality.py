"""How often the token nearest to the prediction is the true one, on the text that follows the prompts."""

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.generation.generator import Generator
from tokmat_jax.method.table import look_up, read
from tokmat_jax.model.backbone import make_forward

_AT_ONCE = 8
"""Rows read together."""


def share_right(generator: Generator, prompts: Prompts) -> np.ndarray:
    """Share [N] of the human tokens after each prompt whose vector is the nearest to the prediction before it.

    Everything before a token is committed and clean. The model is told the K that it is told when it generates.
    """
    forward, vocabulary = make_forward(generator.config), generator.vocabulary
    told = generator.told_tail_length

    @jax.jit
    def nearest(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        prediction, _ = forward(params, look_up(vocabulary.table, ids), jnp.ones(ids.shape),
                                jnp.full((len(ids),), told), positions)
        return read(prediction, vocabulary, 1.0)[0]

    ids = np.array([[*prompt, *human] for prompt, human in zip(prompts.ids, prompts.human, strict=True)], np.int32)
    begin = len(prompts.ids[0])
    batches = np.split(ids, range(_AT_ONCE, len(ids), _AT_ONCE))
    found = [np.asarray(nearest(generator.backbone, rows)) for rows in batches]
    return (np.concatenate(found)[:, begin - 1 : -1] == ids[:, begin:]).mean(axis=1)
