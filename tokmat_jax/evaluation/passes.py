"""Tokens per forward pass: what stable commits cost in quality, and what verified commits gain, which cost none."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokmat_jax.config import Draft, GenerationConfig
from tokmat_jax.generation.generator import Generator

ALLOWED = 1.05
"""Highest allowed judge perplexity, relative to that of one token a step."""


def best_within(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the points whose `perplexity` is at most 5 % above that of the first point, which commits one token a step,
    the one with the most `tokens_per_pass`."""
    bound = ALLOWED * points[0]["perplexity"]
    return max((point for point in points if point is points[0] or point["perplexity"] <= bound),
               key=lambda point: point["tokens_per_pass"])


DRAFTS: tuple[Draft, ...] = ("tail", "lookup", "both")


def reference_of(settings: GenerationConfig) -> GenerationConfig:
    """Immediate projection, told the K of `settings`: what verified commits write."""
    told = settings.tail_length if settings.model_tail_length is None else settings.model_tail_length
    one = dataclasses.replace(settings, rate=None, commit="front").with_tail_length(1)
    return dataclasses.replace(one, rate=1.0, model_tail_length=told)


def verified_cases(base: GenerationConfig, drafts: Sequence[int]) -> dict[str, GenerationConfig]:
    """By name: the reference, one token a pass with a living tail, and verified commits that check each number of
    `drafts` M < K. All but the second write the same text."""
    cases = {"reference": reference_of(base), "one a pass": dataclasses.replace(base, commit="front")}
    checked = dataclasses.replace(base, commit="verified")
    for draft in DRAFTS:
        cases |= {f"{draft}, M {count}": dataclasses.replace(checked, max_commit=count + 1, draft=draft)
                  for count in drafts if count < base.tail_length}
    return cases


def timed(
    run: Generator, prompts: Sequence[Sequence[int]], settings: GenerationConfig, batch_size: int
) -> dict[str, Any]:
    """Tokens a pass, the share of passes in which each draft was right, and speed; it is compiled before it is timed.

    A batch runs until the last of its rows is done, so that passes per second count those of rows.
    """
    run.generate(prompts[:batch_size], settings, batch_size=batch_size)
    begin = time.perf_counter()
    samples = run.generate(prompts, settings, batch_size=batch_size)
    seconds = time.perf_counter() - begin
    tokens, passes = sum(len(one.tokens) for one in samples), sum(one.passes for one in samples)
    accepted = (np.array([one.accepted for one in samples]).sum(axis=0) / passes).tolist()
    return {"tokens_per_pass": tokens / passes, "accepted": accepted, "tokens_per_second": tokens / seconds,
            "passes_per_second": passes / seconds}
