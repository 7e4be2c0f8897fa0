"""Write text with a trained model: python generate.py --workdir runs/quickstart --prompt "In the beginning"

With --show-tail the tail is drawn while it thinks, with --html as a page to replay; --output writes every sample to a
JSONL file, --trajectory what its tail went through.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import tyro

from tokmat_jax.commands.flags import parse
from tokmat_jax.commands.outputs import check_files, numbered, writing
from tokmat_jax.config import GenerationConfig, Profile, SteeringSchedule
from tokmat_jax.distributed.processes import use_compilation_cache
from tokmat_jax.errors import UserError, refusal
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.requests import counts
from tokmat_jax.generation.samples import Moment, Sample, sample_of_moments, sample_of_trajectory
from tokmat_jax.output import stop_unless_read
from tokmat_jax.storage.npy import open_npy
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.view.replay import Run, replay
from tokmat_jax.view.terminal import show_tails, stream_text, visible


@dataclass(frozen=True)
class Args:
    """Continue prompts with a trained model. A flag left out takes the run's own setting."""

    workdir: str
    """Folder of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times, and may be empty (starts from end-of-text)."""
    prompts_file: str | None = None
    """One prompt per line (blank lines are skipped), or JSONL with a field `prompt`, such as an --output of before."""
    max_new_tokens: int | None = None
    """Token budget of a sample; end-of-text may come earlier."""
    tail_length: int | None = None
    """K, slots of the liquid tail; 1 is immediate projection."""
    guidance_scale: float | None = None
    """s; 1 is off."""
    profile: Profile | None = None
    """Maturity along the tail, front first."""
    max_maturity: float | None = None
    """α_max, maturity of the front slot, in [0, 1]."""
    rate: float | tuple[float, ...] | None = None
    """η of the front slot, in [0, 1], or one number per slot; left out everywhere, a slot's rate is its maturity."""
    tail_noise: float | None = None
    """σ of the embryos in units of R (0 to 1)."""
    fresh_noise: float | None = None
    """σ_f, norm in units of R of the noise added to the slots at every step, scaled by 1 − maturity; 0 is off."""
    history_noise: float | None = None
    """σ_h, norm in units of R of the noise added to a vector when it enters the history (0 to 1); 0 is off."""
    history_smoothing: float | None = None
    """h, share of the vector before it in a vector that enters the history, in [0, 1); 0 is off."""
    repulsion: float | None = None
    """ρ, how far predictions are pushed away from what was committed in like places (0.2 to 0.8); 0 is off."""
    repulsion_sharpness: float | None = None
    """b, how alike two predictions must be to count as the same place."""
    steering: float | None = None
    """γ, how far predictions are drawn towards --steering-words or --steering-vector, in units of R (0.1 to 0.5;
    negative pushes away); 0 is off."""
    steering_words: tuple[str, ...] | None = None
    """Words whose mean embedding predictions are drawn to."""
    steering_vector: str | None = None
    """A .npy file with the vector [d] that predictions are drawn to."""
    steering_slots: tuple[int, ...] | None = None
    """Slots that are steered, 0 is the front; left out, all."""
    steering_schedule: SteeringSchedule | None = None
    """Steered alike from the first token to the last, less and less, or more and more."""
    commit: Literal["front", "stable"] | None = None
    """One token a step, or as many from the front on as have settled."""
    max_commit: int | None = None
    """The most that a step commits when stable."""
    patience: int | None = None
    """Updates in a row that must have left a slot's nearest token as it was, before it is committed early."""
    tolerance: float | None = None
    """Bound of its last movement in units of R."""
    entropy_temperature: float | None = None
    """τ of the reported entropy of softmax(cos/τ)."""
    num_samples: int = 1
    """Samples per prompt; they differ by the noise of their embryos."""
    seed: int = 0
    """Decides the noise of the embryos, 0..2³²−1."""
    batch_size: int = 16
    """Samples that run together; changes the speed, not the samples."""
    output: str | None = None
    """JSONL file: text, tokens, and entropy and movement per token."""
    stream: bool = False
    """Print the text while it is committed."""
    show_tail: bool = False
    """Draw committed text and tail at every step, with maturity, entropy and movement of the slots."""
    html: str | None = None
    """A page to write, which replays how a sample came into being; numbered where there are several samples."""
    trajectory: str | None = None
    """An .npz file to write, with what the tail went through (tokmat_jax/trajectory.py); numbered like --html."""
    keep_vectors: bool = False
    """Keep the vectors of all slots in --trajectory too."""
    compare: tuple[str, ...] = ()
    """NAME=VALUE of other settings, with which the same samples are shown beside these: `guidance-scale=2`."""


_SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
_OF_EVERY_MODEL = ("max_new_tokens", "repulsion", "repulsion_sharpness", "entropy_temperature")
"""Settings that mean something for a model without a tail."""
Variant = tuple[str, GenerationConfig]
"""A title, and how the tail is run."""


def read_prompts(args: Args) -> list[str]:
    """All prompts of the command line, in order; raises UserError for a file that cannot be read."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += _prompts_file(Path(args.prompts_file))
    if not prompts:
        raise UserError('no prompt: give --prompt "…" (may be empty) or --prompts-file FILE')
    return prompts


def _prompts_file(path: Path) -> Iterator[str]:
    try:
        # Of all that Unicode counts as an end of a line, only \n and \r\n end one: others may stand inside a prompt.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise UserError(f"--prompts-file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file: {path} is not UTF-8: byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: digits without end, too
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f"--prompts-file: {path} line {number} is no JSON object with a text field 'prompt'")
        yield prompt


def given_settings(args: Args) -> dict[str, Any]:
    """The settings that the command line gives."""
    return {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}


def make_settings(args: Args, given: dict[str, Any], generator: Generator) -> GenerationConfig:
    """The run's settings with those `given`; says on standard error where K is new to the model."""
    if generator.is_autoregressive:
        tail_flags = [name for name in given if name not in _OF_EVERY_MODEL]
        tail_flags += ["steering_vector"] if args.steering_vector is not None else []
        for name in tail_flags:
            raise UserError(f"--{name.replace('_', '-')}: {args.workdir} is an autoregressive baseline, it has no tail")
    own = generator.settings
    if given.get("tail_length", own.tail_length) in range(1, own.tail_length):
        own = own.with_tail_length(given["tail_length"])
    settings = dataclasses.replace(own, **given)
    steered = [name for name in given if name.startswith("steering_")]
    steered += ["steering_vector"] if args.steering_vector is not None else []
    if settings.steering == 0.0 and steered and "steering" not in given:
        raise UserError(f"--{steered[0].replace('_', '-')} does nothing by itself: give its strength too, e.g. "
                        f"--steering 0.3")
    for name in ("max_commit", "patience", "tolerance"):
        if name in given and settings.commit != "stable":
            raise UserError(f"--{name.replace('_', '-')} says how --commit stable commits: give that too")
    if "steering_words" in given and args.steering_vector is not None:
        raise UserError("--steering-words and --steering-vector are two directions: give one of them")
    trained = generator.config.maturation.max_tail_length
    if settings.tail_length > trained and not generator.is_autoregressive:
        print(f"note: a tail of {settings.tail_length} is longer than any in training (K_max {trained})",
              file=sys.stderr)
    return settings


def make_variants(args: Args, generator: Generator) -> list[Variant]:
    """How the tail is run, and how it is run in the samples that --compare puts beside; each named by what differs."""
    given = given_settings(args)
    own = make_settings(args, given, generator)
    if not args.compare:
        return [("", own)]
    words, names = [], []
    for pair in args.compare:
        name, equals, value = pair.partition("=")
        name = name.replace("-", "_")
        if not equals or not value or name not in _SETTINGS or name in names:
            raise UserError(f"--compare takes NAME=VALUE with the name of a setting, each one once, such as "
                            f"guidance-scale=2; found {pair!r}")
        names.append(name)
        words += [f"--{name.replace('_', '-')}", *value.split(",")]
    against = make_settings(args, given | given_settings(parse(Args, ["--workdir", args.workdir, *words])), generator)
    return [(", ".join(f"{name.replace('_', ' ')} {_short(getattr(one, name))}" for name in names), one)
            for one in (own, against)]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def steering_vector(args: Args) -> np.ndarray | None:
    """What --steering-vector holds."""
    if args.steering_vector is None:
        return None
    try:
        return open_npy(args.steering_vector)
    except UserError as error:
        raise UserError(f"--steering-vector: {error}") from None


class Writing:
    """The samples of one command, as it asks to see them."""

    def __init__(
        self, generator: Generator, prompts: Sequence[str], variants: Sequence[Variant], flags: Args,
        direction: np.ndarray | None,
    ):
        self._generator, self._prompts, self._variants, self._flags = generator, prompts, variants, flags
        self._direction = direction
        self._total = len(prompts) * flags.num_samples

    def samples(self) -> Iterator[tuple[Sample, GenerationConfig]]:
        """Every sample with its settings, shown and recorded on the way."""
        flags = self._flags
        if not (flags.stream or flags.show_tail or flags.html is not None or flags.trajectory is not None):
            yield from self._in_batches()
            return
        pairs = [(prompt, number) for prompt in self._prompts for number in range(flags.num_samples)]
        for index, (prompt, number) in enumerate(pairs):
            if flags.stream or flags.show_tail:
                yield from self._watched(prompt, number)
            if flags.html is not None or flags.trajectory is not None:
                shown = flags.stream or flags.show_tail
                for sample, settings in self._recorded(prompt, number, index):
                    if not shown:
                        self._print(sample)
                        yield sample, settings

    def _in_batches(self) -> Iterator[tuple[Sample, GenerationConfig]]:
        """Prints every sample when its batch is complete."""
        flags, [(_, settings)] = self._flags, self._variants
        at_once = max(1, flags.batch_size // flags.num_samples)
        for begin in range(0, len(self._prompts), at_once):
            for sample in self._generator.generate(self._prompts[begin : begin + at_once], settings, flags.num_samples,
                                                   flags.seed, flags.batch_size, self._direction):
                self._print(sample)
                yield sample, settings

    def _print(self, sample: Sample) -> None:
        several = self._total * len(self._variants) > 1
        print(visible(sample.prompt + sample.text) + ("\n---" if several else ""), flush=True)
        self._check_reader()

    def _check_reader(self) -> None:
        """Ends the command if nobody reads what it prints, unless a file gets the samples too."""
        flags = self._flags
        if flags.output is None and flags.html is None and flags.trajectory is None:
            stop_unless_read()

    def _read(self, moments: Iterable[Moment]) -> Iterator[Moment]:
        """`moments`, as long as somebody reads what is printed of them."""
        for moment in moments:
            yield moment
            self._check_reader()

    def _watched(self, prompt: str, number: int) -> Iterator[tuple[Sample, GenerationConfig]]:
        """Shows a sample while it comes into being, beside what it is compared with."""
        generator, seed = self._generator, self._flags.seed
        runs = [(title, self._read(generator.stream(prompt, settings, number, seed, self._direction)))
                for title, settings in self._variants]
        if self._flags.show_tail:
            seen = show_tails(prompt, runs, generator.tokenizer)
        else:
            seen = [stream_text(prompt, moments) for _, moments in runs]
        for moments, (_, settings) in zip(seen, self._variants, strict=True):
            yield sample_of_moments(generator.tokenizer, prompt, number, moments), settings

    def _recorded(self, prompt: str, number: int, index: int) -> list[tuple[Sample, GenerationConfig]]:
        """Writes what the tails of a sample went through."""
        generator, flags, runs, samples = self._generator, self._flags, [], []
        for which, (title, settings) in enumerate(self._variants):
            found = generator.record(prompt, settings, number, flags.seed, keep_vectors=flags.keep_vectors,
                                     direction=self._direction)
            if flags.trajectory is not None:
                path = numbered(flags.trajectory, index * len(self._variants) + which,
                                self._total * len(self._variants))
                with writing("--trajectory", path):
                    found.save(path)
            runs.append(Run(title, found, dataclasses.asdict(settings) | {"seed": flags.seed, "sample": number}))
            samples.append((sample_of_trajectory(generator.tokenizer, prompt, number, found), settings))
        if flags.html is not None:
            path = numbered(flags.html, index, self._total)
            with writing("--html", path):
                path.write_text(replay(f"{flags.workdir}: {prompt}", runs, generator.tokenizer), encoding="utf-8")
        return samples


@contextlib.contextmanager
def opened(output: str | None) -> Iterator[TextIO | None]:
    """The file of --output, opened before anything is generated for it."""
    if output is None:
        yield None
        return
    try:
        with Path(output).open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise refusal(error, f"--output: cannot write {output}", Path(output)) from None


def check(flags: Args) -> None:
    """Raises UserError for flags out of their range or without effect."""
    counts(flags.num_samples, flags.seed, flags.batch_size)
    if flags.compare and not (flags.show_tail or flags.html is not None):
        raise UserError("--compare shows samples beside each other: add --show-tail or --html FILE")
    if flags.keep_vectors and flags.trajectory is None:
        raise UserError("--keep-vectors says what goes into --trajectory FILE: give that too")
    if flags.compare and flags.stream:
        raise UserError("--stream shows one run: for --compare take --show-tail or --html FILE")


def files_of(flags: Args, num_samples: int, num_variants: int) -> dict[str, list[Path]]:
    """What the samples will be written to, by flag; raises UserError for a path that ends in no name."""
    files = {"--output": [Path(flags.output)] if flags.output is not None else []}
    for flag, path, total in (("--html", flags.html, num_samples),
                              ("--trajectory", flags.trajectory, num_samples * num_variants)):
        if path is not None and Path(path).name in ("", ".."):
            raise UserError(f"{flag}: {path!r} names no file")
        files[flag] = [] if path is None else [numbered(path, index, total) for index in range(total)]
    return files


def main(args: Sequence[str]) -> None:
    """Generates what `args` ask for."""
    flags = parse(Args, args)
    check(flags)
    prompts = read_prompts(flags)
    use_compilation_cache(load_config(Path(flags.workdir)).compute)
    generator = Generator.from_workdir(flags.workdir)
    variants = make_variants(flags, generator)
    direction = steering_vector(flags)
    for _, settings in variants:
        generator.check(prompts, settings, direction)
    check_files(files_of(flags, len(prompts) * flags.num_samples, len(variants)),
                {"--prompts-file": flags.prompts_file, "--steering-vector": flags.steering_vector})
    tokens = passes = 0
    with opened(flags.output) as out:
        for sample, settings in Writing(generator, prompts, variants, flags, direction).samples():
            if settings.commit == "stable":
                tokens, passes = tokens + len(sample.tokens), passes + sample.passes
            if out is not None:
                row = dataclasses.asdict(sample) | {"seed": flags.seed, "settings": dataclasses.asdict(settings)}
                if flags.steering_vector is not None:
                    row["steering_vector"] = flags.steering_vector
                print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
    if passes:
        print(f"committed when stable: {tokens} tokens in {passes} passes, {tokens / passes:.2f} a pass",
              file=sys.stderr)
