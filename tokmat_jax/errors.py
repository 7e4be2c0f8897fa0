"""Errors that a user can fix."""

import os
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error in what the user gave. Scripts print its message as one line and exit with code 2.

    The message says what was wrong, what was found and what to do, in one line.
    """


class ConfigError(UserError, ValueError):
    """A configuration value is out of its range or contradicts another one."""


def one_line(error: Exception | str) -> str:
    """The message of another library's `error`, or any foreign text, in a form that our messages can quote.

    The result is printable, on one line, and at most 300 characters long.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:300])[:300]


def refusal(error: OSError, what: str, place: Path) -> UserError:
    """The UserError for a refused system call: it begins with `what`, or with the file that `error` names if that file
    is neither `place` nor below it."""
    reason = error.strerror or one_line(error)
    if isinstance(error.filename, str | bytes | os.PathLike):
        found = Path(os.path.abspath(os.fsdecode(error.filename)))
        if not found.is_relative_to(os.path.abspath(place)):
            return UserError(f"{one_line(str(found))}: {reason}")
    return UserError(f"{what}: {reason}")


def shown(value: Any) -> str:
    """A value from a file in a form that our messages can quote: printable, on one line, at most 100 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= 100 else f"{text[:99]}…"
