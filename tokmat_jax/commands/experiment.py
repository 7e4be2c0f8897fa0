"""Runs named experiments, from training to a row in the log: python -m tokmat_jax experiment NAME --seeds 0 1 2

    configs/experiments.toml ──► train: baseline, judge, run ──► short report card ──► log ──► summary, plot

A maturation run and its baseline train on the same tokens of the same data, with the same backbone and optimiser. The
judge is the baseline of another seed, so that it favours neither. Finished trainings and measurements are reused.
"""

import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tokmat_jax.commands import shipped
from tokmat_jax.commands.flags import parse, parse_config
from tokmat_jax.config import Config, GenerationConfig
from tokmat_jax.config.saved import differences
from tokmat_jax.data.corpus import corpus_of_run
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation import summary
from tokmat_jax.evaluation.card import Card, num_parameters
from tokmat_jax.evaluation.judge import Judge
from tokmat_jax.evaluation.measurement import Options, check_measurement, origin
from tokmat_jax.evaluation.pair import checkpoint_state, config_mismatches, mismatches, prompts_of
from tokmat_jax.evaluation.report import to_json
from tokmat_jax.evaluation.store import Store
from tokmat_jax.generation.generator import Generator
from tokmat_jax.progress import bar
from tokmat_jax.storage.workdir import CHECKPOINTS, CONFIG, load_config, make_workdir

_BY_DESIGN = ("init_from is", "train.num_steps is", "the newest checkpoint is")
"""Allowed differences of a pair if the run has several stages; the total number of tokens is checked instead."""
_OURS = ("--config", "--workdir", "--init-from", "--train.seed", "--help", "-h")
"""Flags that an experiment cannot set."""


@dataclass(frozen=True)
class Args:
    """Run named experiments: train what is missing, measure, log. Without a name, list the experiments."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of experiments in the file."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; each gives one row."""
    file: str = "experiments"
    """TOML file with the experiments; `experiments` names the shipped one, configs/experiments.toml."""
    folder: str = "runs/experiments"
    """Folder for runs, stored parts, summary and plot."""
    log: str = "docs/experiments.jsonl"
    """JSONL file to which each row is appended."""
    num_prompts: int = 64
    """Number of prompts, taken from held-out documents."""
    prompt_tokens: int = 32
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """L, number of new tokens per sample."""
    batch_size: int = 64
    """Samples per batch; changes the speed, not the row."""
    resamples: int = 1000
    """Number of bootstrap resamples per interval."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment changes, and what it is expected to show."""

    name: str
    base: str
    """Config to which the flags are applied: a file, or the name of a shipped one."""
    hypothesis: str
    prediction: str
    flags: tuple[str, ...] = ()
    """Flags for the maturation run only."""
    shared: tuple[str, ...] = ()
    """Flags for both the run and its baseline."""
    first: tuple[str, ...] = ()
    """Flags of the first stage, from which the run starts; empty if there is only one stage."""


def check(flags: Args) -> None:
    """Raises UserError if a number is out of range or the plotting library is missing."""
    check_measurement(flags)
    if not flags.seeds or min(flags.seeds) < 0:
        raise UserError(f"--seeds must be one or several numbers from 0 on, found {list(flags.seeds)}")


def read_experiments(path: Path) -> dict[str, Experiment]:
    """The experiments of a TOML file by name; raises UserError if the file cannot be read or has another format."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--file: cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--file: {path} is not TOML: {error}") from None
    if set(data) != {"base", "experiments"} or not isinstance(data["base"], str) or not isinstance(
            data["experiments"], dict):
        raise UserError(f"--file: {path} must hold a text 'base' and tables [experiments.NAME], found {sorted(data)}")
    return {name: _experiment(path, name, data["base"], found) for name, found in data["experiments"].items()}


def _experiment(path: Path, name: str, base: str, found: Any) -> Experiment:
    where = f"--file: {path}: experiments.{name}"
    if name == "ar" or name.endswith("_ar") or not name.replace("_", "").isalnum():
        raise UserError(f"{where}: a name has letters, digits and underscores; 'ar' is reserved for the baseline")
    if not isinstance(found, dict):
        raise UserError(f"{where} must be a table")
    texts, lists = ("hypothesis", "prediction"), ("flags", "shared", "first")
    for key, value in found.items():
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (key in texts and isinstance(value, str)) and not (key in lists and is_list):
            raise UserError(f"{where}: {key} = {value!r} is not one of the texts {', '.join(texts)} and the lists of "
                            f"texts {', '.join(lists)}")
        for flag in value if is_list else ():
            if flag.split("=")[0] in (_OURS if key == "first" else (*_OURS, "--objective.kind")):
                raise UserError(f"{where}: {key} must leave {flag} to the experiment")
    for key in texts:
        if not found.get(key):
            raise UserError(f"{where} has no {key}: write it before the experiment is run")
    return Experiment(name, base, *(found[key] for key in texts), *(tuple(found.get(key, ())) for key in lists))


@dataclass(frozen=True)
class Stage:
    """One training run."""

    workdir: Path
    flags: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The config that `train` builds from the flags."""
        return parse_config(self.flags)

    def is_done(self) -> bool:
        """Whether the workdir contains exactly this run, trained to its end."""
        if not (self.workdir / CONFIG).is_file():
            return False
        changed = differences(load_config(self.workdir), self.config)
        # Generation settings do not affect training, and a baseline has no tail.
        idle = ("workdir", "generation.", *(("maturation.",) if self.config.objective.kind == "ar" else ()))
        if [name for name in changed if not name.startswith(idle)] or not any(
                (self.workdir / CHECKPOINTS).glob("[0-9]*")):
            return False
        return checkpoint_state(self.workdir)[0] == self.config.train.num_steps

    def train(self) -> None:
        """Runs `train`, which resumes an interrupted run; raises UserError if it fails."""
        if self.is_done():
            return
        if run_command([sys.executable, "-m", "tokmat_jax", "train", *self.flags]) != 0:
            raise UserError(f"training {self.workdir} failed, see above; run the same command again to continue")


def run_command(words: Sequence[str]) -> int:
    """Runs a command and returns its exit code. After Ctrl-C it waits, so that the command can save."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def judge_seed(seed: int) -> int:
    """Seed of the baseline that judges the runs of `seed`: always another seed."""
    return 1 if seed == 0 else 0


def baseline_stage(experiment: Experiment, folder: Path, seed: int) -> Stage:
    """The baseline of `seed`. Experiments without `shared` flags use the same baseline."""
    home = folder / ("ar" if not experiment.shared else f"{experiment.name}_ar") / f"seed-{seed}"
    return _stage(experiment, home, seed, ("--objective.kind", "ar"))


def run_stages(experiment: Experiment, folder: Path, seed: int) -> list[Stage]:
    """The stages of the maturation run of `seed`; the run itself is the last one."""
    home = folder / experiment.name / f"seed-{seed}"
    if not experiment.first:
        return [_stage(experiment, home, seed, experiment.flags)]
    before = home.with_name(f"seed-{seed}-first")
    return [_stage(experiment, before, seed, experiment.first),
            _stage(experiment, home, seed, ("--init-from", str(before), *experiment.flags))]


def _stage(experiment: Experiment, workdir: Path, seed: int, flags: Sequence[str]) -> Stage:
    return Stage(workdir, ("--config", experiment.base, "--workdir", str(workdir), "--train.seed", str(seed),
                           *experiment.shared, *flags))


def tokens(config: Config) -> int:
    """Number of training tokens of a run."""
    return config.train.num_steps * config.train.batch_size * config.data.seq_len


def train(experiment: Experiment, folder: Path, seed: int, flags: Args) -> None:
    """Trains what is missing for `seed`; raises UserError before training a stage that would make the pair unfair."""
    stages, baseline = run_stages(experiment, folder, seed), baseline_stage(experiment, folder, seed)
    check_room(experiment, baseline.config, flags)
    for number, stage in enumerate(stages):  # only now: the second stage cannot be read before the first is trained
        found = [one for one in config_mismatches(stage.config, baseline.config, same_ids=number > 0)
                 if not (experiment.first and one.startswith(_BY_DESIGN))]
        if found:
            raise UserError(f"{experiment.name} is not a fair comparison: {'; '.join(found)}; put flags that concern "
                            f"both into 'shared'")
        spent, others = sum(tokens(one.config) for one in stages[: number + 1]), tokens(baseline.config)
        if number + 1 == len(stages) and spent != others:
            raise UserError(f"{experiment.name} reads {spent:,} tokens in all its stages, its baseline {others:,}: "
                            f"give both the same budget")
        if number + 1 == len(stages) and stage.config.objective.kind != "maturation":
            raise UserError(f"{experiment.name} is not a maturation run: its base {experiment.base} has objective.kind "
                            f"{stage.config.objective.kind!r}")
        stage.train()
    baseline.train()
    baseline_stage(experiment, folder, judge_seed(seed)).train()


def check_room(experiment: Experiment, config: Config, flags: Args) -> None:
    """Raises UserError unless prompts, new text and a plain tail fit into the model's positions."""
    needed = flags.prompt_tokens + flags.max_new_tokens + GenerationConfig().tail_length
    if needed > config.max_positions:
        raise UserError(f"{experiment.name}: prompts of {flags.prompt_tokens} tokens, {flags.max_new_tokens} new ones "
                        f"and a plain tail need {needed} positions, the model has {config.max_positions}: lower "
                        f"--prompt-tokens or --max-new-tokens")


def validation(workdir: Path) -> dict[str, float]:
    """The last validation metrics of a run, by name without prefix."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    last = [row for row in rows if any(name.startswith("validation/") for name in row)][-1]
    return {name.removeprefix("validation/"): value for name, value in last.items() if name != "step"}


def measure(experiment: Experiment, seed: int, flags: Args) -> dict[str, Any]:
    """Measures the trained pair of `seed`; returns its row for the log."""
    folder = Path(flags.folder)
    stages = run_stages(experiment, folder, seed)
    baseline_at, judge_at = (baseline_stage(experiment, folder, one) for one in (seed, judge_seed(seed)))
    at = stages[-1].workdir
    run, baseline, judge = (Generator.from_workdir(one) for one in (at, baseline_at.workdir, judge_at.workdir))
    found = mismatches(run, baseline, (at, baseline_at.workdir))
    found = [one for one in found if not (experiment.first and one.startswith(_BY_DESIGN))]
    if found:
        raise UserError(f"{experiment.name} is not a fair comparison: {'; '.join(found)}")
    prompts = prompts_of(corpus_of_run(run.config, at), run.config, flags.num_prompts, flags.prompt_tokens,
                         flags.max_new_tokens)
    states = {"run": checkpoint_state(at), "baseline": checkpoint_state(baseline_at.workdir),
              "judge": checkpoint_state(judge_at.workdir)}
    of_baseline = {name: states[name] for name in ("baseline", "judge")}
    options = Options(flags.max_new_tokens, 0, flags.resamples, flags.batch_size, "", 2)

    def store(name: str, who: dict[str, tuple[int, int]], models: Sequence[Generator]) -> Store:
        return Store(folder / "parts" / name, origin(who, models, prompts, options))

    card = Card(run, baseline, Judge(judge), prompts, store(experiment.name, states, (run, baseline, judge)), options,
                store("ar", of_baseline, (baseline, judge)))
    with bar(f"measuring {experiment.name}, seed {seed}", card.num_short_parts()) as progress:
        short = card.short(progress.update)
    own, others = validation(at), validation(baseline_at.workdir)
    return {
        "experiment": experiment.name, "seed": seed, "hypothesis": experiment.hypothesis,
        "prediction": experiment.prediction, "base": experiment.base, "flags": experiment.flags,
        "shared": experiment.shared, "first": experiment.first,
        "settings": [settings(stage.config) for stage in stages],
        "tokens": sum(tokens(stage.config) for stage in stages),
        "num_parameters": num_parameters(run), "judge": f"the baseline of seed {judge_seed(seed)}",
        "num_prompts": len(prompts.ids), "prompt_tokens": len(prompts.ids[0]), "new_tokens": flags.max_new_tokens,
        "top1": {"run": own["top1/maturity_1"], "baseline": others["top1/maturity_1"]}, **short,
    }


def settings(config: Config) -> dict[str, Any]:
    """Training settings of `config` that differ from the defaults, by dotted name. They record what was run even if the
    base file changes later."""
    changed = differences(Config(), config)
    return {name: own for name, (_, own) in changed.items() if not name.startswith(("workdir", "generation."))}


def append(row: dict[str, Any], path: Path) -> None:
    """Appends `row` to the log at `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(json.loads(to_json(row)), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--log: cannot write {path}: {error.strerror}") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The newest row of each experiment and seed in the log at `path`; raises UserError if a line is not a row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--log: cannot read {path}: {error}") from None
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            summary.table([row])
            summary.verdict(row)
            rows[row["experiment"], row["seed"]] = row
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise UserError(f"--log: {path} line {number} is not a row of an experiment") from None
    return list(rows.values())


def write_summary(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes `summary.md` and `frontier.svg` for all `rows`."""
    from tokmat_jax.evaluation import plots

    (folder / "summary.md").write_text(summary.table(rows), encoding="utf-8")
    (folder / "frontier.svg").write_text(plots.experiments(rows), encoding="utf-8")


def main(args: Sequence[str]) -> None:
    """Runs the experiments that `args` name."""
    flags = parse(Args, args, prog="python -m tokmat_jax experiment")
    known = read_experiments(shipped.find(flags.file, ".toml", "--file"))
    if not flags.names:
        for one in known.values():
            first = f"first {shlex.join(one.first)}, then " if one.first else ""
            print(f"{one.name}: {one.hypothesis}\n    {first}{shlex.join(one.shared + one.flags) or 'as it is'}")
        return
    check(flags)
    for name in flags.names:
        if name not in known:
            raise UserError(f"{flags.file} has no experiment {name!r}; it has {', '.join(known)}")
    make_workdir(Path(flags.folder), "--folder")
    read_log(Path(flags.log))
    asked = [(known[name], seed) for name in flags.names for seed in flags.seeds]
    for one, seed in asked:  # train all of them first: while this process measures, it occupies the accelerator
        train(one, Path(flags.folder), seed, flags)
    for one, seed in asked:
        row = measure(one, seed, flags)
        said = summary.verdict(row)
        append(row, Path(flags.log))
        print(f"{one.name}, seed {seed}", *said, sep="\n  ")
    write_summary(read_log(Path(flags.log)), Path(flags.folder))
    print(f"done: {flags.log}, {Path(flags.folder) / 'summary.md'}, frontier.svg")
