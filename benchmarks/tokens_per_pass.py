"""Stable commits: tokens per forward pass against quality, for one or more runs, and an estimate of the best rule.

    python benchmarks/tokens_per_pass.py --workdirs runs/quickstart runs/other --judge runs/twin

The judge is a language model with a seed that none of the runs has. A line of JSON per run follows its table.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.config import GenerationConfig
from tokmat_jax.data.corpus import corpus_of_run
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation import scores
from tokmat_jax.evaluation.judge import Judge
from tokmat_jax.evaluation.methods import Method, Written, stable_methods
from tokmat_jax.evaluation.pair import Prompts, prompts_of
from tokmat_jax.evaluation.passes import best_within
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.trajectory import Trajectory


@dataclass(frozen=True)
class Args:
    """Measure the gain of stable commits in tokens per pass, and their cost in quality."""

    workdirs: tuple[str, ...]
    """Folders of maturation runs on one corpus."""
    judge: str
    """Folder of the judge, an autoregressive run."""
    num_prompts: int = 64
    """Number of prompts, taken from held-out documents."""
    prompt_tokens: int = 32
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """New tokens per prompt."""


def measure(run: Generator, judge: Judge, method: Method, prompts: Prompts, new_tokens: int) -> dict[str, Any]:
    """Measures one setting of stable commits; returns its point on the curve."""
    found = run.generate(prompts.ids, GenerationConfig(max_new_tokens=new_tokens, **method.settings), batch_size=64)
    tokens = [one.tokens[:-1] if one.finished else one.tokens for one in found]
    written = Written(tokens, [one.finished for one in found], None, [one.passes for one in found])
    nats = np.concatenate([one.nats for one in judge.read_ids(list(zip(prompts.ids, tokens, strict=True)))])
    measured = scores.per_prompt(written, new_tokens)
    return {"curve": method.curve, "label": method.name.removeprefix(method.curve + ": "),
            "tokens_per_pass": written.tokens_per_pass, "perplexity": float(np.exp(nats.mean())),
            "rep_3": scores.nan_mean(measured["rep_3"]), "periodic_loop": scores.nan_mean(measured["periodic_loop"])}


def foreseen(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How often the slot after the front already has the token that the next step commits, at one token a step.

    A rule that commits only such tokens reaches about 1 / (1 − share) tokens a pass. `after_right` and `after_wrong`
    split the steps by whether that slot saw the right token in the front, that is, whether that token was itself
    foreseen.
    """
    hits = [one.tokens[:-1, 1] == one.tokens[1:, 0] for one in trajectories]
    now, before = (np.concatenate([part[side] for part in hits]) for side in (slice(1, None), slice(None, -1)))
    share = float(now.mean())
    return {"share": share, "after_right": float(now[before].mean()) if before.any() else math.nan,
            "after_wrong": float(now[~before].mean()), "reachable": 1.0 / (1.0 - share) if share < 1.0 else math.inf}


def card(workdir: str, judge: Judge, flags: Args) -> dict[str, Any]:
    """Measures one run and prints the results."""
    run = Generator.from_workdir(workdir)
    if run.is_autoregressive:
        raise UserError(f"--workdirs: {workdir} is an autoregressive baseline, it has no tail")
    prompts = prompts_of(corpus_of_run(run.config, Path(workdir)), run.config, flags.num_prompts, flags.prompt_tokens,
                         flags.max_new_tokens)
    print(f"\n{workdir}: {len(prompts.ids)} prompts, {flags.max_new_tokens} tokens each")
    result: dict[str, Any] = {"workdir": workdir, "curves": {}, "foreseen": {}}
    for curve in dict.fromkeys(method.curve for method in stable_methods()):
        print(f"  {curve}\n    {'':32}tokens/pass  perplexity   Rep-3   loops")
        points = []
        methods = [method for method in stable_methods() if method.curve == curve]
        for method in methods:
            point = measure(run, judge, method, prompts, flags.max_new_tokens)
            points.append(point)
            print(f"    {point['label']:32}{point['tokens_per_pass']:11.3f}{point['perplexity']:12.2f}"
                  f"{point['rep_3']:8.3f}{100 * point['periodic_loop']:6.0f} %", flush=True)
        best = best_within(points)
        one_a_step = GenerationConfig(max_new_tokens=flags.max_new_tokens, **methods[0].settings)
        told = foreseen([run.record(ids, one_a_step, num_candidates=0) for ids in prompts.ids])
        result["curves"][curve], result["foreseen"][curve] = points, told
        print(f"    within 5 % of the perplexity of one a step: {best['tokens_per_pass']:.3f} ({best['label']})\n"
              f"    the slot after the front has the next token in {100 * told['share']:.0f} % of the steps "
              f"({100 * told['after_right']:.0f} % after it was right, {100 * told['after_wrong']:.0f} % after it was "
              f"wrong): about {told['reachable']:.2f} tokens a pass for a rule that commits nothing else")
    return result


def main(args: Sequence[str]) -> None:
    """Prints a table and a line of JSON per run."""
    flags = parse(Args, args)
    if not flags.workdirs:
        raise UserError("--workdirs names no run")
    judge = Judge(Generator.from_workdir(flags.judge))
    for workdir in flags.workdirs:
        print(json.dumps(card(workdir, judge, flags) | {"settings": dataclasses.asdict(flags)}))


if __name__ == "__main__":
    run_script(main)
