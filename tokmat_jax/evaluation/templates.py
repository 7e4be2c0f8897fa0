"""Finds the tokens that many samples of one prompt share: the article's template attractors.

A star alignment: every sample is aligned with the central sample, and the pairs are merged into one table.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

_MATCH, _MISMATCH, _GAP = 1, -1, -1


def align(samples: Sequence[Sequence[int]]) -> list[list[int | None]]:
    """Aligns samples into rows of equal length, one per sample; tokens in a column correspond, None is a gap.

    A row without its gaps is its sample. The centre is the medoid, the sample with the smallest total edit distance
    to all samples (ties go to the first). Needleman–Wunsch aligns each sample with it: match 1, mismatch −1, gap −1. Of
    equally good alignments it takes the one that, read from the end, prefers a pair, then a token that the centre
    lacks. Tokens that the centre lacks between two of its tokens share columns from the left and are not aligned with
    each other.
    """
    if not samples:
        return []
    centre = samples[_medoid(samples)]
    scores = _scores(centre, samples, _MATCH)
    cells = [_cells(centre, sample, scores[:, i]) for i, sample in enumerate(samples)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(centre) + 1)]
    return [_merged(row, widths) for row in cells]


def stable_columns(aligned: Sequence[Sequence[int | None]], share: float = 0.5) -> list[int | None]:
    """The most frequent token of each column if at least `share` of all rows have it there, else None.

    `aligned`: rows of equal length, from `align`. Of equally frequent tokens, the smallest id is taken.
    """
    return [_stable(column, share) for column in zip(*aligned, strict=True)]


def stability(aligned: Sequence[Sequence[int | None]]) -> float:
    """Share in [0, 1] of all samples' tokens that are their column's stable token; NaN if there is no token.

    Alignment alone makes some columns agree, and a few samples agree easily (two always by half): compare it to
    `shuffled_stability`.
    """
    stable = stable_columns(aligned)
    hits = [token == kept for row in aligned for token, kept in zip(row, stable, strict=True) if token is not None]
    return sum(hits) / len(hits) if hits else math.nan


def shuffled_stability(samples: Sequence[Sequence[int]], seed: int) -> float:
    """`stability` of the aligned samples with shuffled tokens: the value due to chance and alignment alone."""
    rng = np.random.default_rng(seed)
    return stability(align([rng.permutation(np.asarray(sample, np.int64)).tolist() for sample in samples]))


def _medoid(samples: Sequence[Sequence[int]]) -> int:
    # Without a reward for matches, the best score is the negative edit distance.
    lengths = np.array([len(sample) for sample in samples])
    rows = np.arange(len(samples))
    totals = [_scores(sample, samples, match=0)[-1, rows, lengths].sum() for sample in samples]
    return int(np.argmax(totals))


def _scores(centre: Sequence[int], samples: Sequence[Sequence[int]], match: int) -> np.ndarray:
    """Best scores [L+1, S, M+1] of the centre's first l tokens against each sample's first m tokens.

    M is the length of the longest sample; entries beyond the end of a shorter sample have no meaning.
    """
    width = max(map(len, samples))
    tokens = np.zeros((len(samples), width), np.int64)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample)] = sample
    gaps = _GAP * np.arange(width + 1)
    scores = np.empty((len(centre) + 1, len(samples), width + 1), np.int64)
    scores[0] = gaps
    for place, token in enumerate(centre):
        above, here = scores[place], scores[place + 1]
        here[:, 0] = above[:, 0] + _GAP
        paired = above[:, :-1] + np.where(tokens == token, match, _MISMATCH)
        here[:, 1:] = np.maximum(paired, above[:, 1:] + _GAP)
        # Gaps in the centre form a chain along the row: without their cost, the chain is a running maximum.
        here[:] = np.maximum.accumulate(here - gaps, axis=1) + gaps
    return scores


def _cells(centre: Sequence[int], sample: Sequence[int], scores: np.ndarray) -> list[list[int | None]]:
    """The sample's tokens at each place 0..L of the centre: tokens that the centre lacks, then its own token there.

    `scores` [L+1, M+1] of this pair. The last place is after the end of the centre and has no token of the centre.
    """
    cells: list[list[int | None]] = [[] for _ in range(len(centre) + 1)]
    place, position = len(centre), len(sample)
    while place > 0 or position > 0:
        paired = place > 0 and position > 0
        if paired:
            reward = _MATCH if centre[place - 1] == sample[position - 1] else _MISMATCH
            paired = scores[place, position] == scores[place - 1, position - 1] + reward
        if paired:
            place, position = place - 1, position - 1
            cells[place].append(sample[position])
        elif position > 0 and scores[place, position] == scores[place, position - 1] + _GAP:
            position -= 1
            cells[place].append(sample[position])
        else:
            place -= 1
            cells[place].append(None)
    return [cell[::-1] for cell in cells]


def _merged(cells: list[list[int | None]], widths: list[int]) -> list[int | None]:
    *inner, behind = cells
    row: list[int | None] = []
    for cell, width in zip(inner, widths, strict=False):
        row += [*cell[:-1], *[None] * (width - len(cell)), cell[-1]]
    return [*row, *behind, *[None] * (widths[-1] - len(behind))]


def _stable(column: Sequence[int | None], share: float) -> int | None:
    counts = Counter(token for token in column if token is not None)
    token = max(counts, key=lambda token: (counts[token], -token), default=None)
    return token if token is not None and counts[token] / len(column) >= share else None
