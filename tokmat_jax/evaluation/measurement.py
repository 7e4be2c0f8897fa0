"""Shared by the report card and experiments: checks of flags, and the origin of a measured part."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.generation.generator import Generator

_FORMAT = 4
"""Format version of the stored parts. Change it whenever the computation of a part changes."""


@dataclass(frozen=True)
class Options:
    """Options from the command line."""

    max_new_tokens: int
    seed: int
    resamples: int
    batch_size: int
    prompt: str
    """Prompt for the article's figures."""
    num_seeds: int
    """Number of samples of that prompt, for the figures over seeds."""
    forbid_end_of_text: bool = False
    """Whether every method writes L tokens, with no end before."""


def check_measurement(flags: Any, **more: int) -> None:
    """Raises UserError if a flag is below its minimum or the plotting library is missing.

    `flags` are those of a command that measures; `more` gives the minimum of additional flags."""
    least = {"num_prompts": 2, "prompt_tokens": 1, "max_new_tokens": 8, "resamples": 1, "batch_size": 1} | more
    for name, bound in least.items():
        if getattr(flags, name) < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, found {getattr(flags, name)}")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise UserError("the report's plots need matplotlib: pip install -e '.[report]'") from None


def origin(
    states: dict[str, tuple[int, int]], models: Sequence[Generator], prompts: Prompts, options: Options
) -> dict[str, Any]:
    """The origin of every stored part; `states` are the checkpoints of `models`. A part is reused only for the same
    origin."""
    return {"format": _FORMAT, "states": states, "configs": [dataclasses.asdict(one.config) for one in models],
            "prompts": [prompts.ids, prompts.human], "new_tokens": options.max_new_tokens, "seed": options.seed,
            "forbid_end": options.forbid_end_of_text}
