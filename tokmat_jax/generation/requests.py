"""Checks the arguments of a request before anything is computed. Scripts and the command line share these checks."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tokmat_jax.errors import UserError, shown

Prompt = str | Sequence[int]
"""Text, or ids of the model's tokenizer."""
_SEEDS = 2**32


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int; raises UserError unless it is a whole number, of Python or NumPy, in `low`..`high`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number, found {shown(value)}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise UserError(f"{name} must " + (f"be at least {low}" if high is None else f"lie in {low}..{high}")
                        + f", found {number}")
    return number


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, of Python or NumPy."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def counts(num_samples: Any, seed: Any, batch_size: Any) -> tuple[int, int, int]:
    """All three as ints; raises UserError if one is not a whole number or is out of range."""
    return (whole_number("num_samples", num_samples, 1), seed_of(seed), whole_number("batch_size", batch_size, 1))


def seed_of(seed: Any, name: str = "seed") -> int:
    """A seed for a JAX key; raises UserError unless it fits into 32 bits."""
    return whole_number(name, seed, 0, _SEEDS - 1)


def prompts_of(prompts: Any, vocab_size: int) -> list[str | list[int]]:
    """Texts unchanged and ids as lists of int; raises UserError for anything else, and if an id is not below
    `vocab_size`."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be a list of texts, or of lists of ids, found {shown(prompts)}")
    return [_prompt(f"prompt {number}", prompt, vocab_size) for number, prompt in enumerate(prompts, 1)]


def _prompt(name: str, prompt: Any, vocab_size: int) -> str | list[int]:
    if not isinstance(prompt, str):
        return ids_of(name, prompt, vocab_size)
    if not is_unicode(prompt):
        raise UserError(f"{name} is not valid Unicode (half of a surrogate pair, or bytes that are not UTF-8): "
                        f"{prompt!r}")
    return prompt


def ids_of(name: str, ids: Any, vocab_size: int) -> list[int]:
    """`ids` [N] as ints, N may be 0; raises UserError unless they are whole numbers in 0..`vocab_size` − 1."""
    try:
        found = np.asarray(ids)
    except ValueError:  # lists of several lengths
        found = np.zeros((), object)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UserError(f"{name} must be a text, or a list of ids, found {shown(ids)}")
    outside = found[(found < 0) | (found >= vocab_size)]
    if outside.size:
        raise UserError(f"{name} has the id {outside[0]}, the tokenizer has the ids 0..{vocab_size - 1}")
    return found.astype(int).tolist()


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
