"""The article's figures as data: how tails mature, what they foresee, what seeds change, how the table moved."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokmat_jax.config import GenerationConfig
from tokmat_jax.evaluation import geometry, metrics, templates
from tokmat_jax.evaluation.scores import nan_mean
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.trajectory import Trajectory

SCALES = (1.0, 2.0)
"""Guidance scales at which tails are shown."""
_AHEAD = 32
"""A slot's token counts as foreseen if it is committed within this many tokens after the step."""


def maturing(sharp: Trajectory, soft: Trajectory, piece: Callable[[int], str], num_tokens: int = 6) -> dict[str, Any]:
    """Entropy and candidates of tokens from birth to commit.

    `soft` and `sharp` are the same sample, read at two temperatures. Of all tokens that passed through the whole tail,
    those whose nearest token changed most often are shown (ties go to the first).
    """
    length = soft.tokens.shape[1]
    whole = range(length - 1, len(soft.tokens))
    changes = {index: _changes(soft.tokens[soft.of_token(index)]) for index in whole}
    chosen = sorted(sorted(changes, key=lambda index: -changes[index])[:num_tokens])
    tokens = []
    for index in chosen:
        path = soft.of_token(index)
        tokens.append({
            "index": index, "token": piece(int(soft.tokens[index, 0])), "changes": changes[index],
            "entropy": soft.entropy[path].tolist(), "sharp_entropy": sharp.entropy[path].tolist(),
            "movement": soft.movement[path].tolist(),
            "candidates": [[piece(int(token)) for token in row] for row in soft.candidates[path]],
            "cosines": soft.cosines[path].tolist(),
        })
    return {
        "tokens": tokens, "tail_length": length, "num_tokens": len(changes),
        "mean_changes": float(np.mean(list(changes.values()))) if changes else 0.0,
        **{name: _by_step(trajectory.entropy, trajectory, whole)
           for name, trajectory in (("entropy", soft), ("sharp_entropy", sharp))},
        "movement": _by_step(soft.movement, soft, whole),
    }


def _changes(tokens: np.ndarray) -> int:
    return int(np.sum(tokens[1:] != tokens[:-1]))


def _by_step(values: np.ndarray, trajectory: Trajectory, indices: Sequence[int]) -> dict[str, list[float]]:
    """Mean and standard deviation over tokens at each of the K refinements."""
    paths = np.array([values[trajectory.of_token(index)] for index in indices])
    if not len(paths):
        return {"mean": [], "std": []}
    return {"mean": paths.mean(0).tolist(), "std": paths.std(0).tolist()}


def readout(trajectory: Trajectory, decode: Callable[[Sequence[int]], str], piece: Callable[[int], str],
            num_moments: int = 6) -> list[dict[str, Any]]:
    """The committed text and the nearest tokens of the tail, at `num_moments` steps spread over the sample."""
    steps = np.unique(np.linspace(0, len(trajectory.tokens) - 1, num_moments).astype(int))
    return [{"step": int(step) + 1, "text": decode(trajectory.tokens[: step + 1, 0].tolist()),
             "tail": [piece(int(token)) for token in trajectory.tokens[step, 1:]]} for step in steps]


def lookahead(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Share of the tail's tokens that are among the next 32 committed tokens, and the same share by chance.

    Chance compares the tails to the text of the next sample in the list, so that frequent words count there too.
    Steps with fewer than 32 tokens after them are skipped; NaN if no slot is left.
    """

    def share(shift: int) -> float:
        hits = []
        for index, trajectory in enumerate(trajectories):
            text = trajectories[(index + shift) % len(trajectories)].tokens[:, 0]
            steps = range(min(len(trajectory.tokens), len(text)) - _AHEAD)
            hits += [np.isin(trajectory.tokens[step, 1:], text[step + 1 : step + 1 + _AHEAD]) for step in steps]
        together = np.concatenate(hits) if hits else np.zeros(0)
        return float(np.mean(together)) if together.size else float("nan")

    return {"share": share(0), "chance": share(1)}


def diversity_by_tail(
    generator: Generator, prompt: str, settings: GenerationConfig, lengths: Sequence[int], num_seeds: int,
    seed: int, batch_size: int,
) -> list[dict[str, float]]:
    """For each K of `lengths`: the diversity of `num_seeds` samples of one prompt, within samples and between them.

    The samples have the numbers 0, 1, … of `seed`.
    """
    found = []
    for length in lengths:
        samples = generator.generate([prompt], dataclasses.replace(settings, tail_length=length), num_seeds,
                                     seed, batch_size)
        tokens = [sample.tokens for sample in samples]
        bigrams = [pair for one in tokens for pair in itertools.pairwise(one)]
        found.append({
            "tail_length": length,
            "within": nan_mean(np.array([metrics.distinct(one, 2) for one in tokens])),
            "between": len(set(bigrams)) / max(len(bigrams), 1),
            "different": len({tuple(one) for one in tokens}) / len(tokens),
        })
    return found


def attractors(samples: Sequence[Sequence[int]], piece: Callable[[int], str], shown: int = 12) -> dict[str, Any]:
    """Aligns samples of one prompt and marks the tokens that most of them share in the same column."""
    aligned = templates.align(samples)
    stable = templates.stable_columns(aligned)
    rows = [[[piece(token), token == stable[column]] for column, token in enumerate(row) if token is not None]
            for row in aligned[:shown]]
    return {"rows": rows, "num_samples": len(samples), "stability": templates.stability(aligned),
            "chance": templates.shuffled_stability(samples, seed=0),
            "template": "".join(piece(token) for token in stable if token is not None)}


def table_geometry(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How training moved the table [V, d] and changed its geometry."""
    moved = geometry.drift(before, after)
    return {
        "drift_degrees": {"mean": float(moved.mean()), "p10": float(np.quantile(moved, 0.1)),
                          "p90": float(np.quantile(moved, 0.9))},
        "nearest_changed": geometry.nearest_changes(before, after),
        "nearest_10_changed": geometry.nearest_changes(before, after, k=10),
        "before": geometry.isotropy(before) | geometry.hubness(before),
        "after": geometry.isotropy(after) | geometry.hubness(after),
    }
