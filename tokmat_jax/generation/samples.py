"""Results for users: whole samples and single moments, built from the steps that the programs return."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.generation.batches import Row
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.method.algorithm import DecodeStep


@dataclass(frozen=True)
class Sample:
    """One finished sample."""

    prompt: str
    """The prompt as given; if it was given as ids, their text."""
    number: int
    """Index of the sample among those of its prompt, from 0."""
    text: str
    """Text that the new tokens add to that of the prompt's ids (`Tokenizer.split`), without end-of-text."""
    tokens: list[int]
    """Committed ids; the last one is end-of-text if `finished`."""
    entropy: list[float]
    """Entropy of softmax(cos/τ) of each token at commit, in nats."""
    movement: list[float]
    """‖Δz̃‖/R of the last update of each token."""
    finished: bool
    """True if it ended with end-of-text, False if it ran out of budget."""
    passes: int
    """Number of steps, each one forward pass (two with guidance); equal to the number of tokens if each step commits
    one."""
    accepted: list[int]
    """Number of passes in which each of the M drafts was accepted, front first; empty unless commits are verified."""


@dataclass(frozen=True)
class Moment:
    """One step of one row, for streaming and display."""

    text: str
    """All new text so far, as in `Sample`."""
    tokens: list[int]
    """Committed ids so far."""
    committed: int
    """Number of tokens that this step committed; 1 unless commits are stable or verified."""
    tail: list[int]
    """Nearest tokens of the slots after those just committed, front first."""
    entropy: list[float]
    """Entropy of all K slots after refinement, in nats; the slots just committed come first."""
    movement: list[float]
    """‖Δz̃‖/R of all K slots."""
    maturity: list[float]
    """α of all K slots."""
    drafts: list[int] = field(default_factory=list)
    """Draft tokens that this step checked, −1 for none; the first `committed` − 1 of them were right. Empty unless
    commits are verified."""


def samples_of(tokenizer: Tokenizer, rows: Sequence[Row], steps: DecodeStep) -> list[Sample]:
    """The sample of each of `rows`, which are the first rows of the batch in `steps` [N, B, …] (NumPy)."""
    measured = (steps.committed, steps.tokens, steps.entropy, steps.movement)
    num_drafts = steps.drafts.shape[-1]
    return [_sample(tokenizer, row, num_drafts, *(np.asarray(part)[:, index] for part in measured))
            for index, row in enumerate(rows)]


def sample_of_moments(tokenizer: Tokenizer, prompt: str, number: int, moments: Sequence[Moment]) -> Sample:
    """Builds the sample from all `moments` of a stream (at least one)."""
    tokens = [[*one.tokens[len(one.tokens) - one.committed:], *one.tail] for one in moments]
    measured = (np.array([one.committed for one in moments]), np.array(tokens),
                np.array([one.entropy for one in moments]), np.array([one.movement for one in moments]))
    return dataclasses.replace(_sample(tokenizer, Row(prompt, [], number), len(moments[0].drafts), *measured),
                               text=moments[-1].text)


def sample_of_trajectory(tokenizer: Tokenizer, prompt: str, number: int, trajectory: Trajectory) -> Sample:
    """Builds the sample from the `trajectory` of its tail."""
    return _sample(tokenizer, Row(prompt, trajectory.prompt.tolist(), number), trajectory.drafts.shape[-1],
                   trajectory.committed, trajectory.tokens, trajectory.entropy, trajectory.movement)


def _sample(
    tokenizer: Tokenizer, row: Row, num_drafts: int, committed: np.ndarray, tokens: np.ndarray, entropy: np.ndarray,
    movement: np.ndarray,
) -> Sample:
    """Builds the sample from N steps that each checked `num_drafts` M and committed the first [N] of R slots [N, R]."""
    taken = np.arange(tokens.shape[1])[None, :] < committed[:, None]
    ids = tokens[taken].tolist()
    return Sample(row.prompt, row.number, tokenizer.split(row.ids, ids)[1], ids, entropy[taken].tolist(),
                  movement[taken].tolist(), ids[-1] in tokenizer.ends, int(np.sum(committed > 0)),
                  [int(np.sum(committed > place)) for place in range(1, num_drafts + 1)])


def moment_of(
    tokenizer: Tokenizer, prompt: Sequence[int], before: Sequence[int], step: DecodeStep, maturity: np.ndarray
) -> Moment:
    """The moment of one `step` [1, 1, K, …] of one row, after the tokens `before`; `maturity` [K] is of its slots."""
    slots, count = np.asarray(step.tokens[0, 0]).tolist(), int(step.committed[0, 0])
    tokens = [*before, *slots[:count]]
    return Moment(tokenizer.split(prompt, tokens)[1], tokens, count, slots[count:],
                  np.asarray(step.entropy[0, 0]).tolist(), np.asarray(step.movement[0, 0]).tolist(), maturity.tolist(),
                  np.asarray(step.drafts[0, 0]).tolist())


def trajectory_of(prompt: Sequence[int], maturity: np.ndarray, steps: DecodeStep) -> Trajectory:
    """The trajectory of `steps` [N, 1, …] of one row, without the steps after its end."""
    alive = np.asarray(steps.committed)[:, 0] > 0
    measured = {field.name: np.asarray(getattr(steps, field.name))[alive, 0] for field in dataclasses.fields(steps)}
    return Trajectory(prompt=np.asarray(prompt, np.int32), maturity=maturity, **measured)
