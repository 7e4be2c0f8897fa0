"""`python -m tokmat_jax COMMAND …`, see `commands/main.py`."""

from tokmat_jax.commands.flags import run_script
from tokmat_jax.commands.main import main

if __name__ == "__main__":
    run_script(main)
