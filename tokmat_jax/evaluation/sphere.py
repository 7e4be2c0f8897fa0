"""Sets the table of an imported language model onto the sphere, and measures how this changes its text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokmat_jax.config import Config
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import load_flat, save_flat
from tokmat_jax.storage.files import appears_whole, read_json, write_json
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.storage.workdir import IMPORTED, TOKENIZER, load_config, save_config

PROMPTS = (
    "The history of the city begins", "In the beginning", "Once upon a time, there was a little",
    "The capital of France is",
    "Scientists have discovered that", "The most important thing about", "She opened the door and",
    "According to the report, the company", "To make a good cup of coffee,", "The war ended in",
)


@dataclass(frozen=True)
class Change:
    """How the sphere changes the greedy continuation of one prompt."""

    prompt: str
    total: int
    """Number of tokens in the continuation by the model with the raw table."""
    changed: int
    """Number of these tokens that the model on the sphere would not choose after the same text."""
    agreed: int
    """Number of leading tokens that are equal in the continuation by the model on the sphere."""


def on_sphere(config: Config) -> Config:
    """The same model with rows of norm R: inputs and logits keep the scale they had with rows of mean norm R.

    Raises UserError unless `config` is an autoregressive model with a raw table.
    """
    if config.objective.kind != "ar" or config.table.geometry != "raw":
        raise UserError(f"{config.workdir} has no raw table: only an imported language model has one")
    return dataclasses.replace(
        config, table=dataclasses.replace(config.table, geometry="sphere"),
        objective=dataclasses.replace(
            config.objective, logit_scale=config.objective.logit_scale * config.table.radius**2),
    )


def set_on_sphere(workdir: Path, out: Path, prompts: Sequence[str], max_new_tokens: int) -> list[Change]:
    """Makes the workdir `out` from the imported `workdir`: the same parameters, read as directions.

    Returns the changes in the greedy continuations of `prompts`. If `workdir` has no raw table or too few positions,
    raises UserError and leaves no files.
    """
    config = on_sphere(load_config(workdir))
    with appears_whole(out) as unfinished:
        plain_path(unfinished)
        _, tokenizer, flat = load_flat(workdir)
        save_config(dataclasses.replace(config, workdir=str(out)), unfinished)
        tokenizer.save(unfinished / TOKENIZER)
        if (workdir / IMPORTED).is_file():
            write_json(unfinished / IMPORTED, read_json(workdir / IMPORTED))
        save_flat(unfinished, flat)
        return changes(workdir, unfinished, prompts, max_new_tokens)


def changes(workdir: Path, other: Path, prompts: Sequence[str], max_new_tokens: int) -> list[Change]:
    """Compares the greedy continuations of `workdir` with those of `other`."""
    raw, moved = Generator.from_workdir(workdir), Generator.from_workdir(other)
    settings = dataclasses.replace(raw.settings, max_new_tokens=max_new_tokens)
    found = []
    for before, after in zip(raw.generate(prompts, settings), moved.generate(prompts, settings), strict=True):
        begin = [*raw.tokenizer.prefix, *raw.tokenizer.encode(before.prompt)] or [raw.tokenizer.end_of_text]
        chosen = moved.next_tokens([*begin, *before.tokens])[len(begin) - 1 : -1]
        changed = sum(one != other for one, other in zip(before.tokens, chosen, strict=True))
        agreed = next((index for index, pair in enumerate(zip(before.tokens, after.tokens, strict=False))
                       if pair[0] != pair[1]), min(len(before.tokens), len(after.tokens)))
        found.append(Change(before.prompt, len(before.tokens), changed, agreed))
    return found
