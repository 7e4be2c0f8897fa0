"""The history of a tail during the generation of one sample, as arrays and as a file."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokmat_jax.errors import UserError
from tokmat_jax.storage.npy import read_npz


@dataclass(frozen=True)
class Trajectory:
    """One sample of N steps with a tail of K slots, front first. Every field is an array of the `.npz` file.

    No array grows with the vocabulary: each slot keeps its C nearest tokens, and its vector if requested.
    """

    prompt: np.ndarray
    """Ids [P] of the prompt."""
    maturity: np.ndarray
    """α [K] of the slots."""
    committed: np.ndarray
    """Number of tokens [N] that each step committed, counted from the front slot; 1 unless commits are stable or
    verified."""
    tokens: np.ndarray
    """Nearest tokens [N, K] after contraction, before the step's commit."""
    entropy: np.ndarray
    """[N, K] nats of softmax(cos(z̃, E)/τ)."""
    movement: np.ndarray
    """‖Δz̃‖/R [N, K]."""
    candidates: np.ndarray
    """The C nearest tokens [N, K, C], nearest first."""
    cosines: np.ndarray
    """Their cosines with z̃ [N, K, C]."""
    vectors: np.ndarray
    """z̃ [N, K, d] after contraction; d = 0 if vectors were not requested."""
    drafts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """Draft tokens [N, M] that each step checked, −1 for none; the first `committed` − 1 of them were right. M = 0
    unless commits are verified."""

    @property
    def text(self) -> np.ndarray:
        """Committed tokens [M], in order."""
        return np.concatenate([row[:count] for row, count in zip(self.tokens, self.committed, strict=True)])

    @property
    def before(self) -> np.ndarray:
        """Number of tokens [N] committed before each step: slot j of step t is token `before[t]` + j of the text."""
        return np.cumsum(self.committed) - self.committed

    def of_token(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps and slots in which token `index` of the text matured, oldest first."""
        slots = index - self.before
        steps = np.flatnonzero((slots >= 0) & (slots < self.tokens.shape[1]))
        return steps, slots[steps]

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` with an array per field."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(self))


def load_trajectory(path: str | Path) -> Trajectory:
    """Reads a file written by `save`; raises UserError if the file is missing or damaged."""
    names = [field.name for field in dataclasses.fields(Trajectory)]
    found = Trajectory(**read_npz(path, names, "trajectory", optional=("drafts",)))
    shapes = {field.name: getattr(found, field.name).shape for field in dataclasses.fields(Trajectory)}
    steps, slots = (*shapes["tokens"], 0, 0)[:2]
    wanted = {"maturity": (slots,), "committed": (steps,), "tokens": (steps, slots), "entropy": (steps, slots),
              "movement": (steps, slots), "cosines": shapes["candidates"]}
    if any(shapes[name] != shape for name, shape in wanted.items()) or len(shapes["prompt"]) != 1 or any(
            len(shapes[name]) != 3 or shapes[name][:2] != (steps, slots) for name in ("candidates", "vectors")) or (
                len(shapes["drafts"]) != 2 or (shapes["drafts"] != (0, 0) and shapes["drafts"][0] != steps)):
        raise UserError(f"{path} is no trajectory: the shapes of its arrays do not match, {shapes}")
    return found
