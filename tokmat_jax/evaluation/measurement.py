"""What the report card and an experiment share: the ranges of their flags, and what a measured part was made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.generation.generator import Generator

_FORMAT = 3
"""Of the stored parts; another number whenever what a part holds is computed in another way."""


def check_measurement(flags: Any, **more: int) -> None:
    """Raises UserError where a flag of a measurement is below its least, or one of `more`, or the plots' library is
    missing. `flags` are those of a command that measures."""
    least = {"num_prompts": 2, "prompt_tokens": 1, "max_new_tokens": 8, "resamples": 1, "batch_size": 1} | more
    for name, bound in least.items():
        if getattr(flags, name) < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, found {getattr(flags, name)}")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise UserError("the report's plots need matplotlib: pip install -e '.[report]'") from None


def origin(
    states: dict[str, tuple[int, int]], models: Sequence[Generator], prompts: Prompts, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """What every stored part was made from; `states` are the checkpoints of `models`. Other origins share nothing."""
    return {"format": _FORMAT, "states": states, "configs": [dataclasses.asdict(one.config) for one in models],
            "prompts": [prompts.ids, prompts.human], "new_tokens": max_new_tokens, "seed": seed}
