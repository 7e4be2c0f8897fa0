"""A small trajectory, made by hand."""

import dataclasses

import numpy as np

from tokmat_jax.generation.trajectory import Trajectory


def made_trajectory() -> dict[str, np.ndarray]:
    """Its arrays by name."""
    tokens = np.arange(6).reshape(3, 2)
    return dataclasses.asdict(Trajectory(
        np.array([7]), np.array([0.9, 0.3]), np.ones(3, int), tokens, 0.1 * tokens, 0.2 * tokens, tokens[..., None],
        1.0 * tokens[..., None], np.zeros((3, 2, 0))))
