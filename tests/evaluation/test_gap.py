"""The train–inference gap against a rollout that runs the whole sequence again at every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from tokmat_jax.evaluation.gap import measure_gap
from tokmat_jax.method.algorithm import embryos

SETTINGS = dataclasses.replace(tiny.CONFIG.maturation, profile="cosine", max_maturity=0.8, tail_noise=0.7)
CONFIG = dataclasses.replace(tiny.CONFIG, maturation=SETTINGS)
PROMPT, LENGTH, SEED = 5, 15, 3
IDS = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, LENGTH)).astype(np.int32)


def maturities(length):
    """α_j = α_max cos(πj / 2K)."""
    return 0.8 * np.cos(0.5 * np.pi * np.arange(length) / length)


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits)


@functools.cache
def rollouts(length):
    """Loss and hit of every step [steps, K] by side, a pair of lists over the rows of IDS; K = `length`."""
    params, _, vocabulary = tiny.model(CONFIG)
    forward = tiny.padded_forward(CONFIG)
    table = np.asarray(vocabulary.table, np.float64)
    alpha = maturities(length)

    def noise(row, number):
        key = jax.random.fold_in(jax.random.key(SEED), row)
        return np.asarray(embryos(key[None], jnp.array([number]), 1, 16, jnp.float32(0.7), 1.0)[0, 0], np.float64)

    def predict(history, slots):
        """ẑ [K, d] of the slots behind committed vectors."""
        z = jnp.asarray(np.stack([*history, *slots]), jnp.float32)[None]
        total = z.shape[1]
        maturity = jnp.asarray([*np.ones(len(history)), *alpha], jnp.float32)[None]
        mask = jnp.tril(jnp.ones((total, total), bool))[None]
        output, _ = forward(params, z, maturity, jnp.array([length]), jnp.arange(total)[None], mask)
        return np.asarray(output[0, len(history) - 1 : total - 1], np.float64)

    def measure(prediction, targets):
        """Cross-entropy of κ · cosine over the whole table, and whether the nearest token is the target."""
        loss, hit = [], []
        for z, target in zip(prediction, targets, strict=True):
            cosine = table @ z / np.linalg.norm(z)  # rows have norm R = 1
            loss.append(-log_softmax(CONFIG.objective.logit_scale * cosine)[target])
            hit.append(float(np.argmax(table @ z) == target))
        return loss, hit

    found = {"simulated": [], "real": []}
    for row, ids in enumerate(IDS.tolist()):
        slots = [noise(row, number) for number in range(length)]
        sides = {"simulated": [], "real": []}
        step = 0
        while PROMPT + step + length <= LENGTH:
            committed = PROMPT + step
            history, targets = [table[token] for token in ids[:committed]], ids[committed : committed + length]
            prediction = predict(history, slots)
            sides["real"].append(measure(prediction, targets))
            # Noise of the simulated tail has numbers that the rollout never reaches, one per position.
            unseen = [noise(row, length + step + LENGTH + j) for j in range(length)]
            simulated = [alpha[j] * table[targets[j]] + (1 - alpha[j]) * unseen[j] for j in range(length)]
            sides["simulated"].append(measure(predict(history, simulated), targets))
            slots = [slot + a * (ahead - slot) for slot, a, ahead in zip(slots, alpha, prediction, strict=True)]
            slots = [*slots[1:], noise(row, length + step)]
            step += 1
        for side, steps in sides.items():
            found[side].append(np.array(steps).transpose(1, 0, 2))
    return found


def measured(ids, length):
    return measure_gap(tiny.shaken_params(CONFIG), CONFIG, ids, PROMPT, length, SEED)


@pytest.mark.parametrize("length", [2, 4])
def test_both_sides_are_those_of_a_naive_rollout(length):
    gap = measured(IDS, length)
    # Windows of 15 behind 5: the last of 11 − K steps has its K targets at the end; the first K do not count.
    num_steps = 11 - length
    assert gap.count == 2 * (num_steps - length)
    np.testing.assert_allclose(gap.maturity, maturities(length), rtol=1e-6)
    for side in ("simulated", "real"):
        rows = rollouts(length)[side]
        assert [row.shape for row in rows] == [(2, num_steps, length)] * 2
        loss, hit = np.concatenate([row[:, length:] for row in rows], axis=1).mean(1)
        # κ = 20 times cosines that are right to about 10⁻⁶, and errors that a rollout carries along.
        np.testing.assert_allclose(getattr(gap, f"{side}_loss"), loss, atol=2e-4)
        np.testing.assert_allclose(getattr(gap, f"{side}_top1"), hit, atol=1e-6)


def test_the_two_sides_differ_behind_the_front_alone():
    # The front is predicted at the position before it, the one committed last, and attention is causal: that output
    # sees committed positions only, which both sides share. The second slot's prediction sees the front.
    gap = measured(IDS, 4)
    np.testing.assert_allclose(gap.simulated_loss[0], gap.real_loss[0], rtol=1e-6)
    assert gap.simulated_top1[0] == gap.real_top1[0]
    assert np.abs(gap.simulated_loss - gap.real_loss)[1:].min() > 1e-3


def test_what_a_row_gives_does_not_depend_on_its_neighbours():
    length = 2
    other = (IDS[:1] + 7) % tiny.VOCAB

    def second(first):
        """What the second row adds beside `first`: a mean over two rows, less half of what the first gives alone."""
        together, alone = measured(np.concatenate([first, IDS[1:]]), length), measured(first, length)
        return np.stack([2 * together.real_loss - alone.real_loss,
                         2 * together.simulated_loss - alone.simulated_loss])

    # Losses of about 10 nats in float32, doubled.
    np.testing.assert_allclose(second(IDS[:1]), second(other), atol=1e-4)
    want = [rollouts(length)[side][1][0, length:].mean(0) for side in ("real", "simulated")]
    np.testing.assert_allclose(second(IDS[:1]), want, atol=4e-4)


def test_the_seed_changes_the_noise_and_nothing_else():
    one, again = measured(IDS, 2), measured(IDS, 2)
    np.testing.assert_array_equal(one.real_loss, again.real_loss)
    other = measure_gap(tiny.shaken_params(CONFIG), CONFIG, IDS, PROMPT, 2, SEED + 1)
    np.testing.assert_allclose(other.real_loss[0], one.real_loss[0], rtol=1e-6)
    assert np.abs(other.real_loss[1] - one.real_loss[1]) > 1e-4
    assert np.abs(other.simulated_loss[1] - one.simulated_loss[1]) > 1e-4
