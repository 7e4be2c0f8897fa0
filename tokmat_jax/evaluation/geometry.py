"""Geometry of the rows of a vocabulary table, and how training moved them. Works on blocks of rows, never on [V, V].

The cosine with a row of zeros counts as 0.
"""

import math
from collections.abc import Iterator

import numpy as np

_ROWS = 1024
_ROUNDING = 1e-28
"""If the mean squared distance of unit rows from their mean is below this, the rows are equal up to rounding."""


def drift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Angle [V] in degrees, in [0, 180], between each row of `before` [V, d] and the same row of `after` [V, d]."""
    return np.concatenate([_angle(_unit(before[block]), _unit(after[block])) for block in _blocks(len(before))])


def nearest_changes(before: np.ndarray, after: np.ndarray, k: int = 1) -> float:
    """Share in [0, 1] of each row's `k` nearest other rows by cosine that are new in `after`, mean over the rows.

    `before` and `after` are [V, d]. For k = 1 this is the share of tokens whose nearest neighbour changed.
    """
    old, new = _nearest(before, k), _nearest(after, k)
    kept = np.any(new[:, :, None] == old[:, None, :], axis=-1)
    return float(1.0 - np.mean(kept))


def isotropy(table: np.ndarray) -> dict[str, float]:
    """How evenly the rows of `table` [V, d], V ≥ 2, fill the directions. Independent of the scale of the table.

    `mean_cosine`, in [−1/(V−1), 1]: mean cosine of two different rows; 0 if no direction is preferred.
    `partition_ratio`, in (0, 1]: min Z(c) / max Z(c) with Z(c) = Σ_i exp(⟨c, w_i⟩) over the eigenvectors c of WᵀW,
    each with both signs; 1 is isotropic (Mu & Viswanath 2018, arXiv:1702.01417). Z depends on the norms of the rows,
    so they are scaled here to a mean norm of 1; the paper does not scale them.
    `effective_dimensions`, in [1, d]: participation ratio (Σλ)² / Σλ² of the eigenvalues λ of the covariance of the
    rows at norm 1; NaN if all rows have the same direction.
    """
    unit = _unit(table)
    total = unit.sum(0)
    count = len(unit)
    pairs = total @ total - np.sum(unit * unit)
    return {
        "mean_cosine": float(pairs / (count * (count - 1))),
        "partition_ratio": _partition_ratio(np.asarray(table, np.float64)),
        "effective_dimensions": _participation(unit - total / count),
    }


def hubness(table: np.ndarray, k: int = 10) -> dict[str, float]:
    """Hubs among nearest neighbours (Radovanović et al. 2010, JMLR 11). `table` is [V, d], k < V.

    N_k of a row is the number of other rows that have it among their `k` nearest by cosine; its mean is k.
    `skewness`: third standardised moment of N_k; 0 if it is equal for all rows, high if there are hubs.
    `largest_hub`, in [1, (V−1)/k]: the largest N_k over k.
    `antihubs`, in [0, 1): share of rows with N_k = 0.
    """
    occurrences = np.bincount(_nearest(table, k).ravel(), minlength=len(table))
    centred = occurrences - occurrences.mean()
    spread = float(np.sqrt(np.mean(centred**2)))
    return {
        "skewness": float(np.mean(centred**3)) / spread**3 if spread > 0 else 0.0,
        "largest_hub": float(occurrences.max() / k),
        "antihubs": float(np.mean(occurrences == 0)),
    }


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))


def _unit(table: np.ndarray) -> np.ndarray:
    rows = np.asarray(table, np.float64)
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    # arccos(cosine) would lose angles below 10⁻⁶ degrees to rounding, and would return such an angle for 0.
    half = np.arctan2(np.linalg.norm(one - other, axis=-1), np.linalg.norm(one + other, axis=-1))
    return np.degrees(2.0 * half)


def _nearest(table: np.ndarray, k: int) -> np.ndarray:
    """Ids [V, k] of each row's `k` nearest other rows by cosine, unsorted."""
    if not 1 <= k < len(table):
        raise ValueError(f"k must be from 1 to {len(table) - 1}, the number of other rows, not {k}")
    unit = _unit(table).astype(np.float32)
    nearest = []
    for block in _blocks(len(unit)):
        cosine = unit[block] @ unit.T
        own = np.arange(len(cosine))
        cosine[own, block.start + own] = -np.inf
        nearest.append(np.argpartition(cosine, -k, axis=-1)[:, -k:])
    return np.concatenate(nearest)


def _partition_ratio(table: np.ndarray) -> float:
    table = table / np.mean(np.linalg.norm(table, axis=-1))
    directions = np.linalg.eigh(table.T @ table).eigenvectors
    sums = np.zeros((2, table.shape[1]))
    for block in _blocks(len(table)):
        inner = table[block] @ directions
        sums += np.exp(inner).sum(0), np.exp(-inner).sum(0)
    return float(sums.min() / sums.max())


def _participation(centred: np.ndarray) -> float:
    # The sums of eigenvalues and of their squares are the trace and the squared norm of the covariance.
    covariance = centred.T @ centred / len(centred)
    variance = float(np.trace(covariance))
    return variance**2 / float(np.sum(covariance**2)) if variance > _ROUNDING else math.nan
