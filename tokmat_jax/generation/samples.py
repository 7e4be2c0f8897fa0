"""What users are given: whole samples and single moments, made of the steps that the programs return."""

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
    """What one row committed."""

    prompt: str
    """As it was given; of ids their text."""
    number: int
    """Which of the prompt's samples this is, from 0."""
    text: str
    """What the new tokens add to the text of the prompt's ids (`Tokenizer.split`), without end-of-text."""
    tokens: list[int]
    """Committed ids; the last one is end-of-text if `finished`."""
    entropy: list[float]
    """Per token, at commit, of softmax(cos/τ), nats."""
    movement: list[float]
    """Per token, ‖Δz̃‖/R of its last update."""
    finished: bool
    """Whether it ended with end-of-text rather than with its budget."""
    passes: int
    """Steps that it took, each one forward pass (two with guidance); as many as tokens if each commits one."""
    accepted: list[int]
    """In how many passes each of the M drafts, the nearest first, was right; empty unless commits are verified."""


@dataclass(frozen=True)
class Moment:
    """One step of one row, for those who watch."""

    text: str
    """All new text so far, as in `Sample`."""
    tokens: list[int]
    """Committed ids so far."""
    committed: int
    """How many of them this step committed; 1 unless commits are stable or verified."""
    tail: list[int]
    """Nearest tokens of the slots behind those just committed, front first."""
    entropy: list[float]
    """Of all K slots as they were refined, those just committed first, nats."""
    movement: list[float]
    """‖Δz̃‖/R of all K slots."""
    maturity: list[float]
    """α of all K slots."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that this step checked, −1 for none; the first `committed` − 1 of them were right. Empty unless commits
    are verified."""


def samples_of(tokenizer: Tokenizer, rows: Sequence[Row], steps: DecodeStep) -> list[Sample]:
    """The sample of each of `rows`, which lead the batch [N, B, …] of `steps` in NumPy."""
    measured = (steps.committed, steps.tokens, steps.entropy, steps.movement)
    num_drafts = steps.drafts.shape[-1]
    return [_sample(tokenizer, row, num_drafts, *(np.asarray(part)[:, index] for part in measured))
            for index, row in enumerate(rows)]


def sample_of_moments(tokenizer: Tokenizer, prompt: str, number: int, moments: Sequence[Moment]) -> Sample:
    """The sample that all `moments` of a stream (at least one) add up to."""
    tokens = [[*one.tokens[len(one.tokens) - one.committed:], *one.tail] for one in moments]
    measured = (np.array([one.committed for one in moments]), np.array(tokens),
                np.array([one.entropy for one in moments]), np.array([one.movement for one in moments]))
    return dataclasses.replace(_sample(tokenizer, Row(prompt, [], number), len(moments[0].drafts), *measured),
                               text=moments[-1].text)


def sample_of_trajectory(tokenizer: Tokenizer, prompt: str, number: int, trajectory: Trajectory) -> Sample:
    """The sample whose tail went through `trajectory`."""
    return _sample(tokenizer, Row(prompt, trajectory.prompt.tolist(), number), trajectory.drafts.shape[-1],
                   trajectory.committed, trajectory.tokens, trajectory.entropy, trajectory.movement)


def _sample(
    tokenizer: Tokenizer, row: Row, num_drafts: int, committed: np.ndarray, tokens: np.ndarray, entropy: np.ndarray,
    movement: np.ndarray,
) -> Sample:
    """The sample of what N steps, which checked `num_drafts` M each, committed [N] of their R slots [N, R]."""
    taken = np.arange(tokens.shape[1])[None, :] < committed[:, None]
    ids = tokens[taken].tolist()
    return Sample(row.prompt, row.number, tokenizer.split(row.ids, ids)[1], ids, entropy[taken].tolist(),
                  movement[taken].tolist(), ids[-1] == tokenizer.end_of_text, int(np.sum(committed > 0)),
                  [int(np.sum(committed > place)) for place in range(1, num_drafts + 1)])


def moment_of(
    tokenizer: Tokenizer, prompt: Sequence[int], before: Sequence[int], step: DecodeStep, maturity: np.ndarray
) -> Moment:
    """What one `step` [1, 1, K, …] of one row did after the tokens `before`; `maturity` is that of its K slots."""
    slots, count = np.asarray(step.tokens[0, 0]).tolist(), int(step.committed[0, 0])
    tokens = [*before, *slots[:count]]
    return Moment(tokenizer.split(prompt, tokens)[1], tokens, count, slots[count:],
                  np.asarray(step.entropy[0, 0]).tolist(), np.asarray(step.movement[0, 0]).tolist(), maturity.tolist(),
                  np.asarray(step.drafts[0, 0]).tolist())


def trajectory_of(prompt: Sequence[int], maturity: np.ndarray, steps: DecodeStep) -> Trajectory:
    """What `steps` [N, 1, …] of one row did, those after its end left out."""
    alive = np.asarray(steps.committed)[:, 0] > 0
    measured = {field.name: np.asarray(getattr(steps, field.name))[alive, 0] for field in dataclasses.fields(steps)}
    return Trajectory(prompt=np.asarray(prompt, np.int32), maturity=maturity, **measured)
