"""Algorithm 1 as it reads, with nothing clever: the whole sequence is run again for every token.

The oracle of `decode.py` and `cache.py`, and the other side of their benchmark. One row, no cache, Python loops; it
shares with them the model, the vocabulary table, and the noise of embryo number i and of position n.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.decode import Tail, embryos, history_noise
from tokmat_jax.guidance import history_mask
from tokmat_jax.model import Forward, Params
from tokmat_jax.table import Vocabulary


def generate_naively(
    params: Params, forward: Forward, vocabulary: Vocabulary, prompt: list[int], max_new_tokens: int,
    key: jax.Array, tail: Tail, radius: float, end_of_text: int, told_tail_length: int,
) -> tuple[list[int], np.ndarray]:
    """Tokens committed behind `prompt` (at least one id), and the tail [steps, K, d] after each contraction.

    Guidance runs wherever `tail.guidance_scale` is not 1, with the mask that history dropout has in training, and
    repulsion wherever `tail.repulsion` is not 0, over predictions for the committed positions that are made anew.
    """
    length = tail.maturity.shape[0]
    table, size = vocabulary.table, vocabulary.table.shape[1]

    def embryo(number):
        return embryos(key[None], jnp.array([number]), 1, size, tail.noise, radius)[0, 0]

    history = [table[token] for token in prompt]
    slots = [embryo(number) for number in range(length)]
    tokens, trajectory = [], []
    while len(tokens) < max_new_tokens:
        z = jnp.stack(history + slots)[None]
        total, committed = z.shape[1], len(history)
        maturity = jnp.concatenate([jnp.ones(committed), tail.maturity])[None]
        told = jnp.array([told_tail_length])

        def predict(hidden, z=z, maturity=maturity, told=told, total=total, committed=committed):
            mask = history_mask(total, jnp.array([committed]), jnp.array([hidden]))
            return forward(params, z, maturity, told, jnp.arange(total)[None], mask)[0][0]

        everywhere = predict(False)
        prediction = everywhere[committed - 1 : total - 1]
        if tail.repulsion != 0.0:
            prediction = jnp.stack([pushed(one, everywhere, history, tail) for one in prediction])
        if tail.guidance_scale != 1.0:
            free = predict(True)[committed - 1 : total - 1]
            prediction = free + tail.guidance_scale * (prediction - free)
        slots = [slot + rate * (ahead - slot) for slot, rate, ahead in zip(slots, tail.rate, prediction, strict=True)]
        trajectory.append(np.stack([np.asarray(slot) for slot in slots]))
        token = int(jnp.argmax(vocabulary.readout @ slots[0]))
        tokens.append(token)
        disturbance = history_noise(key[None], jnp.array([committed]), size, tail, radius)[0]
        history.append(table[token] + disturbance)
        slots = [*slots[1:], embryo(length + len(tokens) - 1)]
        if token == end_of_text:
            break
    return tokens, np.stack(trajectory)


def pushed(
    prediction: jax.Array, everywhere: jax.Array, history: list[jax.Array], tail: Tail
) -> jax.Array:
    """A slot's `prediction` [d] pushed away from the `history` of committed vectors [d] (repulsion.py).

    `everywhere` [T, d] is the model's output; the one at position m − 1 predicted position m.
    """
    length = jnp.linalg.norm(prediction)
    total, away = 0.0, jnp.zeros_like(prediction)
    for position in range(1, len(history)):
        before, after = everywhere[position - 1], history[position]
        cosine = prediction @ before / (length * jnp.linalg.norm(before))
        weight = jnp.exp(tail.repulsion_sharpness * (cosine - 1))
        total, away = total + weight, away + weight * after / jnp.linalg.norm(after)
    return prediction - tail.repulsion * length * away / max(total, 1.0)
