"""What a tail went through while one sample was written, as arrays and as a file."""

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokmat_jax.errors import UserError


@dataclass(frozen=True)
class Trajectory:
    """One sample of N steps with a tail of K slots, front first; what slot j holds is committed j steps later."""

    tokens: np.ndarray
    """Nearest tokens [N, K] after contraction; column 0 is what was committed."""
    entropy: np.ndarray
    """[N, K] nats of softmax(cos(z̃, E)/τ)."""
    movement: np.ndarray
    """‖Δz̃‖/R [N, K]."""
    candidates: np.ndarray
    """The C nearest tokens [N, K, C], nearest first."""
    cosines: np.ndarray
    """Their cosines with z̃ [N, K, C]."""

    def of_token(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps and slots through which the token committed at step `index` matured, oldest first."""
        slots = np.arange(min(index, self.tokens.shape[1] - 1), -1, -1)
        return index - slots, slots

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` with an array per field."""
        np.savez_compressed(path, **dataclasses.asdict(self))


def load_trajectory(path: str | Path) -> Trajectory:
    """What `save` wrote; raises UserError where the file is missing or damaged."""
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Trajectory(**{field.name: stored[field.name] for field in dataclasses.fields(Trajectory)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no trajectory: {error}") from None
