"""Algorithm 1 written naively: every step runs the model over the whole sequence.

The oracle for the tests of `method/algorithm.py` and `cache.py`, and the baseline of their benchmark. One row, no
cache, Python loops over NumPy. It shares with them the model, the vocabulary table, and the noise of embryo number i,
of step t and of position n.
"""

from collections.abc import Mapping

import jax
import numpy as np

from tokmat_jax.method.ending import Ends
from tokmat_jax.method.history import history_noise
from tokmat_jax.method.noise import embryos, fresh
from tokmat_jax.method.table import Vocabulary
from tokmat_jax.method.tail import Tail
from tokmat_jax.model.attention import history_mask
from tokmat_jax.model.backbone import Model

_EMBRYOS = jax.jit(embryos, static_argnames=("count", "embed_dim", "radius"))
_FRESH = jax.jit(fresh, static_argnames=("embed_dim", "radius"))
_HISTORY_NOISE = jax.jit(history_noise, static_argnames=("embed_dim", "radius"))
_HISTORY_MASK = jax.jit(history_mask, static_argnames="seq_len")


def generate_by_reference(
    model: Model, vocabulary: Vocabulary, prompt: list[int], max_new_tokens: int, key: jax.Array, tail: Tail,
    ends: Ends, max_commit: int = 1, pins: Mapping[int, int] | None = None,
) -> tuple[list[int], np.ndarray]:
    """Tokens committed after `prompt` (at least one id), and the tail [steps, K, d] after each contraction.

    Guidance uses the mask of history dropout in training. Repulsion recomputes the predictions for the committed
    positions. Stable commits take up to `max_commit` tokens. `pins` maps the number of a new token to the token that
    its slot is held at from the start.
    """
    # Keep the tail in NumPy: a loop over JAX arrays would wait for every single operation.
    key, tail, pins, radius = key[None], jax.tree.map(np.asarray, tail), pins or {}, vocabulary.radius
    table, readout = np.asarray(vocabulary.table), np.asarray(vocabulary.readout)
    length, size = tail.maturity.shape[0], table.shape[1]

    def embryo(number):
        return np.asarray(_EMBRYOS(key, np.array([number], np.int32), 1, size, tail.noise, radius))[0, 0]

    history = [table[token] for token in prompt]
    slots = [embryo(number) for number in range(length)]
    said = [[] for _ in slots]  # nearest tokens of each slot so far, oldest first
    tokens, trajectory = [], []
    while len(tokens) < max_new_tokens and not set(ends) & set(tokens):
        z = np.stack(history + slots)[None]
        total, committed = z.shape[1], len(history)
        maturity = np.concatenate([np.ones(committed, np.float32), tail.maturity])[None]
        told = np.where(np.arange(total) < committed, tail.model_tail_length, length).astype(np.int32)[None]
        positions = np.arange(total, dtype=np.int32)[None]

        def predict(hidden, z=z, maturity=maturity, told=told, positions=positions, committed=committed):
            mask = _HISTORY_MASK(z.shape[1], np.array([committed], np.int32), np.array([hidden]))
            return np.asarray(model(z, maturity, told, positions, mask)[0][0])

        everywhere = predict(False)
        prediction = everywhere[committed - 1 : total - 1]
        if tail.repulsion is not None:
            prediction = np.stack([pushed(one, everywhere, history, tail) for one in prediction])
        if tail.guidance is not None:
            free = predict(True)[committed - 1 : total - 1]
            prediction = free + tail.guidance.scale * (prediction - free)
        if tail.steering is not None:
            prediction = np.stack([
                one + radius * drawn(slot, len(tokens) + slot, tail) for slot, one in enumerate(prediction)])
        before = slots
        slots = [slot + rate * (ahead - slot) for slot, rate, ahead in zip(slots, tail.rate, prediction, strict=True)]
        if tail.fresh_noise is not None:
            numbers = np.full((1, length), committed, np.int32)
            noise = np.asarray(_FRESH(key, numbers, np.arange(length), tail.maturity, tail.fresh_noise, size,
                                      radius))[0]
            slots = [slot + one for slot, one in zip(slots, noise, strict=True)]
        slots = [table[pins[len(tokens) + index]] if len(tokens) + index in pins else slot
                 for index, slot in enumerate(slots)]
        trajectory.append(np.stack(slots))
        for index, slot in enumerate(slots):
            number = len(tokens) + index
            barred = ends if tail.ends_within is not None and max_new_tokens - number > tail.ends_within else ()
            said[index].append(pins.get(number, nearest(readout @ slot, barred)))
        count = 1
        while (tail.stability is not None and count < min(max_commit, length, max_new_tokens - len(tokens))
               and said[count - 1][-1] not in ends
               and all(settled(said[index], before[index], slots[index], tail, radius) for index in range(count + 1))):
            count += 1
        for token in [words[-1] for words in said[:count]]:
            vector = table[token]
            if tail.entry.smoothing is not None:
                vector = (1.0 - tail.entry.smoothing) * vector + tail.entry.smoothing * history[-1]
            if tail.entry.noise is not None:
                place = np.array([len(history)], np.int32)
                vector = vector + np.asarray(_HISTORY_NOISE(key, place, size, tail.entry.noise, radius))[0]
            history.append(vector)
            tokens.append(token)
        slots = [*slots[count:], *(embryo(length + len(tokens) - count + index) for index in range(count))]
        said = [*said[count:], *([] for _ in range(count))]
    return tokens, np.stack(trajectory)


def nearest(scores: np.ndarray, barred: Ends) -> int:
    """The token with the largest of `scores` [V] that is not `barred`."""
    allowed = scores.copy()
    allowed[list(barred)] = -np.inf
    return int(np.argmax(allowed))


def settled(said: list[int], before: np.ndarray, after: np.ndarray, tail: Tail, radius: float) -> bool:
    """Whether a slot is settled (stability.py), given its nearest tokens so far (`said`) and its last move [d]."""
    assert tail.stability is not None
    patience = int(tail.stability.patience)
    moved = float(np.linalg.norm(after - before)) / radius
    return len(said) > patience and len(set(said[-patience - 1 :])) == 1 and moved < float(tail.stability.tolerance)


def drawn(slot: int, number: int, tail: Tail) -> np.ndarray:
    """Vector [d] that steering adds to the prediction of `slot`, which becomes new token `number`, in units of R."""
    steering = tail.steering
    assert steering is not None
    place = min(number / max(float(steering.budget) - 1.0, 1.0), 1.0)
    weight = (float(steering.begin) * (1.0 - place) + float(steering.end) * place) * float(steering.strength[slot])
    return weight * np.asarray(steering.direction)


def pushed(
    prediction: np.ndarray, everywhere: np.ndarray, history: list[np.ndarray], tail: Tail
) -> np.ndarray:
    """A slot's `prediction` [d] pushed away from the `history` of committed vectors [d] (repulsion.py).

    `everywhere` [T, d] is the model's output; the one at position m − 1 predicted position m.
    """
    assert tail.repulsion is not None
    strength, sharpness = float(tail.repulsion.strength), float(tail.repulsion.sharpness)
    length = np.linalg.norm(prediction)
    total, away = 0.0, np.zeros_like(prediction)
    for position in range(1, len(history)):
        before, after = everywhere[position - 1], history[position]
        cosine = prediction @ before / (length * np.linalg.norm(before))
        weight = np.exp(sharpness * (cosine - 1))
        total, away = total + weight, away + weight * after / np.linalg.norm(after)
    return prediction - strength * length * away / max(total, 1.0)
