"""Verified commits: tokens a pass, acceptance and speed over M and K; and a check that the text equals the reference.

    python benchmarks/verified.py --workdir runs/quickstart                      # the table
    python benchmarks/verified.py --workdir runs/quickstart --compare 10000      # differences from the reference

The reference is immediate projection (K = 1, η = 1) with the same K as input of the model. For each continuation that
differs, the two nearest tokens of the reference at the first difference are compared: how far apart are their cosines?
Queries of another shape round differently, so near ties may go either way; ties closer than --bound are counted
separately.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.data.corpus import corpus_of_run
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.passes import reference_of, timed, verified_cases
from tokmat_jax.generation.generator import Generator


@dataclass(frozen=True)
class Args:
    """Measure verified commits of one run."""

    workdir: str
    """Folder of a maturation run, or of one with a tail in front of a language model."""
    tail_lengths: tuple[int, ...] = (4, 8)
    """Values of K in the table."""
    num_drafts: tuple[int, ...] = (1, 2, 3)
    """Values of M in the table; each K uses those below K."""
    repulsions: tuple[float, ...] = (0.0, 0.4)
    """Values of ρ in the table."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Numbers of rows per batch."""
    num_prompts: int = 32
    """Number of held-out prompts for the table."""
    prompt_tokens: int = 32
    """Tokens per prompt."""
    max_new_tokens: int = 64
    """New tokens per prompt."""
    compare: int = 0
    """If positive, compare this number of continuations to the reference instead of printing the table."""
    bound: float = 1e-5
    """The two nearest tokens are a tie if their cosines differ by less than this."""
    guidance_scale: float = 1.0
    """Guidance scale s for --compare."""


def beginnings(run: Generator, flags: Args, count: int) -> list[list[int]]:
    """`count` prompts, evenly spread over the held-out text."""
    windows = corpus_of_run(run.config, Path(flags.workdir)).windows("validation")
    stream = np.concatenate([windows[index]["tokens"] for index in range(len(windows))])
    starts = np.linspace(0, len(stream) - flags.prompt_tokens, count).astype(int)
    return [stream[start : start + flags.prompt_tokens].tolist() for start in starts]


def line_of(found: dict[str, Any], plain: float) -> str:
    """One row of the table; `plain` is the reference's tokens per second."""
    accepted = " ".join(f"{100 * share:.0f}" for share in found["accepted"])
    return (f"{found['tokens_per_pass']:6.3f} tokens/pass{found['tokens_per_second']:9.0f} tokens/s "
            f"({found['tokens_per_second'] / plain:.2f} x){found['passes_per_second']:8.0f} passes/s"
            + f"   accepted {accepted} %" * bool(accepted))


def table(run: Generator, flags: Args) -> list[dict[str, Any]]:
    """Measures and prints every setting and the reference."""
    prompts, rows = beginnings(run, flags, flags.num_prompts), []
    for repulsion in flags.repulsions:
        for length in flags.tail_lengths:
            base = dataclasses.replace(run.settings.with_tail_length(length), repulsion=repulsion,
                                       max_new_tokens=flags.max_new_tokens)
            for batch_size in flags.batch_sizes:
                print(f"repulsion {repulsion:g}, K {length}, batch {batch_size}")
                plain = None
                cases = verified_cases(base, flags.num_drafts)
                if run.config.objective.kind == "tail":
                    del cases["one a pass"]  # such a tail is always checked
                for name, settings in cases.items():
                    found = timed(run, prompts, settings, batch_size)
                    plain = plain or found["tokens_per_second"]
                    print(f"  {name:14}{line_of(found, plain)}", flush=True)
                    rows.append({"repulsion": repulsion, "tail_length": length, "batch_size": batch_size, "name": name,
                                 **found})
    return rows


def compare(run: Generator, flags: Args) -> dict[str, Any]:
    """How many continuations differ from the reference, and the reference's margin at the first difference."""
    prompts = beginnings(run, flags, flags.compare)
    settings = dataclasses.replace(run.settings, commit="verified", max_commit=4,
                                   max_new_tokens=flags.max_new_tokens, guidance_scale=flags.guidance_scale)
    plain = reference_of(settings)
    ours, theirs = (run.generate(prompts, one, batch_size=64) for one in (settings, plain))
    margins = []
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        if one.tokens != other.tokens:
            place = next(index for index, pair in enumerate(zip(one.tokens, other.tokens, strict=False))
                         if pair[0] != pair[1])
            cosines = run.record(prompt, plain, num_candidates=2).cosines[place, 0]
            margins.append(float(cosines[0] - cosines[1]))
    large = [margin for margin in margins if margin > flags.bound]
    tokens, passes = sum(len(one.tokens) for one in ours), sum(one.passes for one in ours)
    print(f"{len(prompts):,} continuations, {tokens:,} tokens, {tokens / passes:.3f} a pass, {run.config.model.dtype}: "
          f"{len(large)} differ although the two nearest tokens are further apart than {flags.bound:g}; "
          f"{len(margins) - len(large)} at closer ties (the widest {max(margins, default=0.0):.2g})")
    return {"continuations": len(prompts), "tokens": tokens, "tokens_per_pass": tokens / passes,
            "differences": len(large), "ties": len(margins) - len(large), "margins": margins}


def main(args: Sequence[str]) -> None:
    """Prints a table or a comparison, and a line of JSON."""
    flags = parse(Args, args)
    run = Generator.from_workdir(flags.workdir)
    if run.is_autoregressive:
        raise UserError(f"--workdir: {flags.workdir} is an autoregressive baseline, it has no tail")
    found = compare(run, flags) if flags.compare else table(run, flags)
    print(json.dumps({"found": found, "settings": dataclasses.asdict(flags),
                      "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    run_script(main)
