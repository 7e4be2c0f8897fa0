"""Reading against training: how much faster the loader delivers tokens than a training step consumes them.

    pip install -e '.[quickstart]' && python benchmarks/data_reading.py

One process alternates between rounds of batches from the prepared corpus and rounds of training steps of the same
config. The loader reads up to 32 batches ahead, also while steps are timed; a round of batches is much longer than
that. A line of JSON follows the card.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from side_by_side import machine, median, print_ratio, quartiles, take_turns

from tokmat_jax.commands.flags import load_config_file, parse, run_script
from tokmat_jax.config import Config
from tokmat_jax.data.corpus import Corpus, prepare
from tokmat_jax.data.loader import train_batches
from tokmat_jax.distributed.mesh import make_mesh, process_rows, put_rows, put_whole
from tokmat_jax.keys import seed_key
from tokmat_jax.training.step import make_train_functions

AIM = 20.0


@dataclass(frozen=True)
class Args:
    """Time reading against training."""

    config: str = "configs/quickstart.py"
    """Config that gives the corpus to read and the step to time."""
    batches: int = 1024
    """Batches per round."""
    steps: int = 8
    """Training steps per round."""
    rounds: int = 7
    """Rounds of reading and of training."""


def reading(config: Config, corpus: Corpus, count: int) -> Callable[[], None]:
    """`count` batches of one process, requested as in `train.py`."""
    rows = process_rows(make_mesh(config.mesh), config.train.batch_size)
    batches = train_batches(corpus.windows("train"), config.train.batch_size, config.train.seed, rows)

    def work() -> None:
        for _ in range(count):
            next(batches)

    return work


def training(config: Config, corpus: Corpus, count: int) -> Callable[[], None]:
    """`count` steps on one batch that is already on the devices."""
    mesh = make_mesh(config.mesh)
    rows = process_rows(mesh, config.train.batch_size)
    ids = next(train_batches(corpus.windows("train"), config.train.batch_size, config.train.seed, rows))
    with jax.set_mesh(mesh):
        batch, unigram = put_rows(ids, rows, config.train.batch_size, mesh), put_whole(corpus.unigram(), mesh)
        functions = make_train_functions(config, corpus.tokenizer.vocab_size, mesh)
        held = [functions.init(seed_key(config.train.seed))]

    def work() -> None:
        state = held.pop()
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, _ = functions.step(state, batch, unigram)
        held.append(jax.block_until_ready(state))

    return work


def measure(config: Config, flags: Args) -> dict[str, Any]:
    """Tokens per second of both, and their ratio in each round."""
    corpus = prepare(config)
    found = take_turns({"reading": reading(config, corpus, flags.batches),
                        "training": training(config, corpus, flags.steps)}, flags.rounds)
    tokens = config.train.batch_size * config.data.seq_len
    rates = {"reading": tokens * flags.batches / median(found, "reading"),
             "training": tokens * flags.steps / median(found, "training")}
    each = [(flags.batches / one) / (flags.steps / other) for one, other in zip(
        found["reading"]["seconds"], found["training"]["seconds"], strict=True)]
    return {"tokens_per_second": rates, "ratio": quartiles(each), "found": found}


def main(args: Sequence[str]) -> None:
    """Prints the card."""
    flags = parse(Args, args)
    config = load_config_file(Path(flags.config))
    measured = measure(config, flags)
    print(f"reading, {flags.config}: batches of {config.train.batch_size} × {config.data.seq_len} tokens, "
          f"{flags.rounds} rounds of {flags.batches} batches and {flags.steps} steps")
    for name, rate in measured["tokens_per_second"].items():
        print(f"  {name:12}{rate:14,.0f} tokens/s")
    print_ratio("the loader against the training step", measured["ratio"], AIM)
    print(json.dumps({"benchmark": "data_reading", **measured, "settings": asdict(flags), "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
