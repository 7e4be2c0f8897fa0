"""Train a model: python train.py --config configs/quickstart.py [--section.field value …]"""

from tokmat_jax.commands.flags import run_script
from tokmat_jax.commands.train import main

if __name__ == "__main__":
    run_script(main)
