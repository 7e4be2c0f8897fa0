"""The report card: python -m tokmat_jax evaluate --workdir RUN --baseline AR_RUN --output report/

Writes report.md, report.json, report.html and plots/. If it was interrupted, run the same command again to continue.
"""

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmat_jax.commands.flags import parse
from tokmat_jax.data.corpus import corpus_of_run
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation import report
from tokmat_jax.evaluation.card import Card, num_parameters
from tokmat_jax.evaluation.frontier import SHOWN, Point
from tokmat_jax.evaluation.judge import Judge
from tokmat_jax.evaluation.measurement import Options, check_measurement, origin
from tokmat_jax.evaluation.pair import checkpoint_state, mismatches, prompts_of
from tokmat_jax.evaluation.render import to_html, to_markdown
from tokmat_jax.evaluation.store import Store
from tokmat_jax.evaluation.verdicts import verdicts
from tokmat_jax.generation.generator import Generator
from tokmat_jax.progress import bar
from tokmat_jax.storage.workdir import CONFIG, make_workdir


@dataclass(frozen=True)
class Args:
    """Compare a maturation run with its autoregressive baseline, and both with the human text."""

    workdir: str
    """Folder of the maturation run."""
    baseline: str
    """Folder of the baseline: the same data, backbone and budget with --objective.kind ar."""
    output: str = "report"
    """Folder of the report."""
    judge: str | None = None
    """Judge: workdir, checkpoint folder, .gguf file or hub name of a language model. Default: the baseline."""
    num_prompts: int = 64
    """Number of prompts, taken from held-out documents."""
    prompt_tokens: int = 32
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """L, number of new tokens per sample."""
    prompt: str = "The meaning of life is"
    """Prompt for the article's figures."""
    num_seeds: int = 50
    """Number of samples of that prompt, for the figures over seeds."""
    seed: int = 0
    """Seed of all noise and draws, 0..2³²−1."""
    resamples: int = 1000
    """Number of bootstrap resamples per interval."""
    batch_size: int = 64
    """Samples per batch; changes the speed, not the report."""
    forbid_end_of_text: bool = False
    """Let no method end a sample before L tokens, so that repetition is compared on the same prompts."""
    allow_mismatch: bool = False
    """Allow a pair that does not match; the first line of the report then lists the differences."""


def check(flags: Args) -> None:
    """Raises UserError if a number is out of range or the plotting library is missing."""
    check_measurement(flags, num_seeds=2)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed must lie in 0..2³²−1, found {flags.seed}")


def load_pair(flags: Args) -> tuple[Generator, Generator, list[str]]:
    """Both models and their mismatches; raises UserError if there are any and `allow_mismatch` is off."""
    run, baseline = Generator.from_workdir(flags.workdir), Generator.from_workdir(flags.baseline)
    if run.is_autoregressive:
        raise UserError(f"--workdir: {flags.workdir} is an autoregressive baseline, not a maturation run")
    if run.config.objective.kind == "tail":
        raise UserError(f"--workdir: {flags.workdir} is a tail in front of a language model, whose text it never "
                        f"changes; a report card is of a maturation run")
    if not baseline.is_autoregressive:
        raise UserError(f"--baseline: {flags.baseline} is a {baseline.config.objective.kind} run; train one with "
                        f"--objective.kind ar")
    found = mismatches(run, baseline, (Path(flags.workdir), Path(flags.baseline)))
    if found and not flags.allow_mismatch:
        raise UserError(f"{flags.baseline} is not a fair baseline of {flags.workdir}: {'; '.join(found)}. Train a "
                        f"matching one, or add --allow-mismatch")
    return run, baseline, found


def load_judge(flags: Args, baseline: Generator, output: Path) -> tuple[Judge, Path]:
    """The judge given by `flags` and its workdir. A checkpoint is imported once, into the report's folder."""
    if flags.judge is None:
        return Judge(baseline), Path(flags.baseline)
    workdir = Path(flags.judge)
    if not ((workdir / CONFIG).is_file() and (workdir / "checkpoints").is_dir()):
        workdir = output / "judge" / imported_name(flags.judge)
        if not workdir.is_dir():
            from tokmat_jax.hf.convert import import_weights

            import_weights(flags.judge, workdir)
    return Judge(Generator.from_workdir(workdir)), workdir


def imported_name(source: str) -> str:
    """Folder name of an imported judge: its name and a fingerprint, so that a changed checkpoint is imported again."""
    path = Path(source)
    files = [one for one in (sorted(path.iterdir()) if path.is_dir() else [path]) if one.is_file()]
    state = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    digest = hashlib.sha256(json.dumps([source, state]).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', path.name).strip('-.')}-{digest}"


def describe(name: str, generator: Generator, step: int) -> dict[str, Any]:
    """Facts about a model for the head of the report."""
    return {"name": name, "step": step, "num_parameters": num_parameters(generator)}


def draw(data: dict[str, Any]) -> dict[str, str]:
    """The report's plots as SVG by name."""
    from tokmat_jax.evaluation import plots

    found, curves = data["frontier"], {}
    for point in found["points"]:
        curves.setdefault(point["curve"], []).append(
            Point(*(point[name] for name in ("label", "repetition", "perplexity"))))
    baselines = {point["curve"]: point["is_sampling"] for point in found["points"] if point["is_baseline"]}
    figures = data["figures"]
    human, shown = Point(**found["human"]), {name: curves[name] for name in SHOWN if name in curves}
    drawn = {"frontier": plots.frontier(shown, human, baselines),
             "frontier_all": plots.frontier(curves, human, baselines),
             "entropy": plots.entropy(figures["maturing"], tuple(figures["temperatures"]))}
    drawn |= {f"candidates_{index}": plots.candidates(token)
              for index, token in enumerate(figures["maturing"]["tokens"][:3])}
    if data["passes"]:
        drawn["passes"] = plots.passes(data["passes"])
    return drawn | {"diversity": plots.diversity(figures["diversity"]), "gap": plots.gap(data["gap"])}


def write(data: dict[str, Any], output: Path) -> None:
    """Writes the report in its three formats, and its plots."""
    drawn = draw(data)
    (output / "plots").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        (output / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
    blocks = report.document(data)
    (output / "report.json").write_text(report.to_json(data), encoding="utf-8")
    (output / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (output / "report.html").write_text(to_html(data["title"], blocks, drawn), encoding="utf-8")


def main(args: Sequence[str]) -> None:
    """Writes the report that `args` describe."""
    begin = time.monotonic()
    flags = parse(Args, args, prog="python -m tokmat_jax evaluate")
    check(flags)
    run, baseline, found = load_pair(flags)
    output = Path(flags.output)
    make_workdir(output, "--output")
    corpus = corpus_of_run(run.config, Path(flags.workdir))
    prompts = prompts_of(corpus, run.config, flags.num_prompts, flags.prompt_tokens, flags.max_new_tokens)
    judge, judges_workdir = load_judge(flags, baseline, output)
    states = {name: checkpoint_state(Path(path)) for name, path in (
        ("run", flags.workdir), ("baseline", flags.baseline), ("judge", judges_workdir))}
    options = Options(flags.max_new_tokens, flags.seed, flags.resamples, flags.batch_size, flags.prompt,
                      flags.num_seeds, flags.forbid_end_of_text)
    store = Store(output / "parts", origin(states, (run, baseline, judge.generator), prompts, options))
    for note in prompts.notes:
        print(f"note: {note}")
    card = Card(run, baseline, judge, prompts, store, options)
    with bar("evaluating", card.num_parts()) as progress:
        data = card.data(progress.update)
    data["judge"]["name"] = flags.judge or flags.baseline
    data |= {
        "forbids_end": flags.forbid_end_of_text,
        "title": "Token Maturation against ordinary decoding", "mismatch": found, "seed": flags.seed,
        "run": describe(flags.workdir, run, states["run"][0]), "temperature": 1.0,
        "baseline": describe(flags.baseline, baseline, states["baseline"][0]),
        "prompts": {"count": len(prompts.ids), "prompt_tokens": len(prompts.ids[0]),
                    "new_tokens": flags.max_new_tokens, "notes": list(prompts.notes)},
        "command": f"python -m tokmat_jax evaluate {shlex.join(args)}", "seconds": time.monotonic() - begin,
    }
    write(data, output)
    if store.reused:
        print(f"{len(store.reused)} parts were there already, in {output / 'parts'}")
    if found:
        print(f"MISMATCH: {'; '.join(found)}", file=sys.stderr)
    for one in verdicts(data):
        print(f"{one.question} {one.answer}: {one.figure}, {one.interval}")
    print(f"done: {output / 'report.html'}, report.md, report.json, plots/")
