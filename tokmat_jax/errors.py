"""Mistakes that a user can mend."""


class UserError(Exception):
    """Something the user gave does not fit: scripts show the message as one line and exit with code 2.

    The message says what was wrong, what was found and what to do, in one line.
    """


class ConfigError(UserError, ValueError):
    """A configuration value is out of its range or contradicts another one."""


def one_line(error: Exception) -> str:
    """What another library's `error` says, for a message of ours: line breaks become spaces, 300 characters at most."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
