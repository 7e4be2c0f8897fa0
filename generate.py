"""Write text with a trained model: python generate.py --workdir runs/quickstart --prompt "In the beginning" """

from tokmat_jax.commands.flags import run_script
from tokmat_jax.commands.generate import main

if __name__ == "__main__":
    run_script(main)
