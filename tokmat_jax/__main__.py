"""`python -m tokmat_jax COMMAND …`, or `tokmat COMMAND …`, see `commands/main.py`."""

from tokmat_jax.commands import main as commands
from tokmat_jax.commands.flags import run_script


def main() -> None:
    """Runs the command that the process' arguments begin with."""
    run_script(commands.main)


if __name__ == "__main__":
    main()
