"""Mistakes that a user can mend."""


class UserError(Exception):
    """Something the user gave does not fit: scripts show the message as one line and exit with code 2.

    The message says what was wrong, what was found and what to do, in one line.
    """


class ConfigError(UserError, ValueError):
    """A configuration value is out of its range or contradicts another one."""
