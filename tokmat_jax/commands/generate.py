"""Write text with a trained model: python generate.py --workdir runs/quickstart --prompt "In the beginning"

--show-tail draws the tail at every step, --html writes a page that replays it, --output writes every sample to a JSONL
file, and --trajectory writes the history of its tail.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import tyro

from tokmat_jax.commands.flags import WITHOUT_PREFIX, flag_of, given, parse, value_of
from tokmat_jax.commands.outputs import check_files, numbered, writing
from tokmat_jax.config import GenerationConfig
from tokmat_jax.config.checks import facts_of
from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.distributed.processes import use_compilation_cache
from tokmat_jax.errors import ConfigError, UserError, refusal
from tokmat_jax.generation.generator import Generator, settings_of
from tokmat_jax.generation.requests import counts
from tokmat_jax.generation.samples import Moment, Sample, sample_of_moments, sample_of_trajectory
from tokmat_jax.output import stop_unless_read
from tokmat_jax.storage.npy import open_npy
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.view.replay import Run, replay
from tokmat_jax.view.terminal import show_tails, stream_text, visible


@dataclass(frozen=True)
class Args:
    """Continue prompts with a trained model. Flags you omit are taken from the run's config."""

    workdir: str
    """Folder of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; repeat the flag for several prompts. An empty text starts from end-of-text."""
    prompts_file: str | None = None
    """One prompt per line (blank lines are skipped), or JSONL with a field `prompt`, such as an earlier --output."""
    chat: bool = False
    """Write each prompt as a user's message with the model's chat template; a line of a JSONL prompts file may have
    `messages`, each with `role` and `content`, instead of `prompt`."""
    generation: Annotated[GenerationConfig, WITHOUT_PREFIX] = dataclasses.field(default_factory=GenerationConfig)
    """Settings of the tail, one flag per field."""
    steering_vector: str | None = None
    """.npy file with the vector [d] towards which predictions are pulled."""
    num_samples: int = 1
    """Number of samples per prompt; they differ in the noise of their embryos."""
    seed: int = 0
    """Seed of the embryo noise, 0..2³²−1."""
    batch_size: int = 16
    """Samples per batch; changes the speed, not the samples."""
    output: str | None = None
    """JSONL file to write: text, tokens, and the entropy and movement of each token."""
    stream: bool = False
    """Print the text as it is committed."""
    show_tail: bool = False
    """Draw the committed text and the tail at every step, with maturity, entropy and movement of the slots."""
    html: str | None = None
    """HTML page to write, which replays the generation of a sample; numbered if there are several samples."""
    trajectory: str | None = None
    """.npz file to write, with the history of the tail (tokmat_jax/generation/trajectory.py); numbered like --html."""
    keep_vectors: bool = False
    """Include the vectors of all slots in --trajectory."""
    compare: tuple[str, ...] = ()
    """NAME=VALUE of changed settings, such as `guidance-scale=2`; the same samples with them are shown side by side."""


Variant = tuple[str, GenerationConfig]
"""A title, and the settings of the tail."""


def parse_for_run(words: Sequence[str]) -> Args:
    """Parses the `words` of the command line; omitted settings are taken from the run in --workdir.

    Raises UserError as `parse` does, if the folder is not a run, and for settings of a tail if the model has no tail.
    """
    workdir = value_of([*words], "--workdir")
    if workdir is None:
        return parse(Args, words)
    try:
        config = load_config(Path(workdir))
    except UserError:
        with contextlib.suppress(ConfigError):  # errors in the flags are reported first, and --help needs no run
            parse(Args, words)
        raise
    if config.objective.kind == "ar" and (of_tail := _flags_of_tail(words)):
        raise UserError(f"{of_tail[0]}: {workdir} is an autoregressive baseline, it has no tail")
    own = _shortened(settings_of(config), value_of([*words], "--tail-length"))
    return parse(Args, words, Args(workdir, generation=own))


def _flags_of_tail(words: Sequence[str]) -> list[str]:
    """The flags among `words` that have no effect for a model without a tail."""
    names = given(GenerationConfig, words)
    of_every_model = _with("every_model", names)
    vector = [name for name in given(Args, words) if name == "steering_vector"]
    return [flag_of(name) for name in names + vector if name not in of_every_model]


def _with(fact: str, names: Sequence[str]) -> list[str]:
    """Those of the generation settings `names` that have the given `fact`."""
    return [name for name in names if facts_of(GenerationConfig, fact)[name]]


def _shortened(own: GenerationConfig, tail_length: str | None) -> GenerationConfig:
    """`own` with the `tail_length` of the command line if that is shorter, so that settings per slot stay valid."""
    try:
        asked = int(tail_length or "")
    except ValueError:
        return own
    return own.with_tail_length(asked) if asked in range(1, own.tail_length) else own


Messages = list[dict[str, str]]
"""A conversation: each message has `role` and `content`."""


def read_prompts(args: Args) -> list[str | Messages]:
    """All prompts of the command line, in order; raises UserError if a file cannot be read."""
    prompts: list[str | Messages] = list(args.prompt)
    if args.prompts_file is not None:
        prompts += _prompts_file(Path(args.prompts_file), args.chat)
    if not prompts:
        raise UserError('no prompt: give --prompt "…" (may be empty) or --prompts-file FILE')
    return prompts


def _prompts_file(path: Path, chat: bool) -> Iterator[str | Messages]:
    try:
        # Only \n and \r\n end a line: the other line separators of Unicode may be part of a prompt.
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
            row: Any = json.loads(line)
            prompt: Any = row["messages"] if chat and "messages" in row else row["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: also for a number with too many digits
            prompt = None
        if not isinstance(prompt, str) and not (chat and _is_conversation(prompt)):
            what = " or 'messages', each with 'role' and 'content'" if chat else ""
            raise UserError(f"--prompts-file: {path} line {number} is not a JSON object with a text field 'prompt'"
                            f"{what}")
        yield prompt


def _is_conversation(found: Any) -> bool:
    return isinstance(found, list) and len(found) > 0 and all(
        isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content")) for one in found)


def as_chat(prompt: str | Messages, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation; a text is one message of a user."""
    return tokenizer.encode_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def check_settings(flags: Args, names: Sequence[str], generator: Generator) -> None:
    """Raises UserError if one of the given settings `names` has no effect. Prints a note to standard error if K is
    larger than in training."""
    settings = flags.generation
    vector = ["steering_vector"] if flags.steering_vector is not None else []
    steered = _with("of_steering", names) + vector
    if settings.steering == 0.0 and steered and "steering" not in names:
        raise UserError(f"{flag_of(steered[0])} does nothing by itself: give its strength too, e.g. --steering 0.3")
    for name in names:
        rules = [rule for rule in ("stable", "verified") if _with(f"of_{rule}", [name])]
        if rules and settings.commit not in rules:
            raise UserError(f"{flag_of(name)} has no effect without --commit {' or '.join(rules)}: add it")
    if "steering_words" in names and vector:
        raise UserError("--steering-words and --steering-vector both set the direction: give only one of them")
    trained = generator.config.maturation.max_tail_length
    if settings.tail_length > trained and not generator.is_autoregressive:
        print(f"note: a tail of {settings.tail_length} is longer than any in training (K_max {trained})",
              file=sys.stderr)


def make_variants(words: Sequence[str], flags: Args, generator: Generator) -> list[Variant]:
    """The settings given by the `words` of the command line and their `flags`, and those of the samples that --compare
    adds. Each title names the settings that differ."""
    check_settings(flags, given(GenerationConfig, words), generator)
    if not flags.compare:
        return [("", flags.generation)]
    compared = _compared(flags.compare)
    words = [*words, *itertools.chain(*([flag_of(name), *values] for name, values in compared.items()))]
    other = parse_for_run(words)
    check_settings(other, given(GenerationConfig, words), generator)
    return [(", ".join(f"{name.replace('_', ' ')} {_short(getattr(one, name))}" for name in compared), one)
            for one in (flags.generation, other.generation)]


def _compared(pairs: Sequence[str]) -> dict[str, list[str]]:
    """The values that --compare gives, by name of the setting; raises UserError for anything but NAME=VALUE."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        name = name.replace("-", "_")
        if not value or name in found or name not in (one.name for one in dataclasses.fields(GenerationConfig)):
            raise UserError(f"--compare takes NAME=VALUE with the name of a setting, each one once, such as "
                            f"guidance-scale=2; found {pair!r}")
        found[name] = value.split(",")
    return found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def steering_vector(args: Args) -> np.ndarray | None:
    """The vector in the file of --steering-vector."""
    if args.steering_vector is None:
        return None
    try:
        return open_npy(args.steering_vector)
    except UserError as error:
        raise UserError(f"--steering-vector: {error}") from None


class Writing:
    """Generates the samples of one command and shows and records them as its flags say."""

    def __init__(
        self, generator: Generator, prompts: Sequence[str | list[int]], variants: Sequence[Variant],
        flags: Args, direction: np.ndarray | None,
    ):
        self._generator, self._prompts, self._variants, self._flags = generator, prompts, variants, flags
        self._direction = direction
        self._total = len(prompts) * flags.num_samples

    def samples(self) -> Iterator[tuple[Sample, GenerationConfig]]:
        """Yields every sample with its settings, and shows and records it."""
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
        """Yields every sample, and prints it when its batch is complete."""
        flags, [(_, settings)] = self._flags, self._variants
        at_once = max(1, flags.batch_size // flags.num_samples)
        for begin in range(0, len(self._prompts), at_once):
            for sample in self._generator.generate(self._prompts[begin : begin + at_once], settings, flags.num_samples,
                                                   flags.seed, flags.batch_size, self._direction):
                self._print(sample)
                yield sample, settings

    def _print(self, sample: Sample) -> None:
        several = self._total * len(self._variants) > 1
        before = "" if self._flags.chat else sample.prompt
        print(visible(before + sample.text) + ("\n---" if several else ""), flush=True)
        self._check_reader()

    def _check_reader(self) -> None:
        """Ends the command if standard output is closed, unless samples are also written to a file."""
        flags = self._flags
        if flags.output is None and flags.html is None and flags.trajectory is None:
            stop_unless_read()

    def _read(self, moments: Iterable[Moment]) -> Iterator[Moment]:
        """`moments`, until standard output is closed."""
        for moment in moments:
            yield moment
            self._check_reader()

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._generator.tokenizer.decode(prompt)

    def _watched(self, prompt: str | list[int], number: int) -> Iterator[tuple[Sample, GenerationConfig]]:
        """Shows a sample during generation, side by side with those of --compare."""
        generator, seed = self._generator, self._flags.seed
        runs = [(title, self._read(generator.stream(prompt, settings, number, seed, self._direction)))
                for title, settings in self._variants]
        shown = "" if self._flags.chat else self._text(prompt)
        if self._flags.show_tail:
            seen = show_tails(shown, runs, generator.tokenizer)
        else:
            seen = [stream_text(shown, moments) for _, moments in runs]
        for moments, (_, settings) in zip(seen, self._variants, strict=True):
            yield sample_of_moments(generator.tokenizer, self._text(prompt), number, moments), settings

    def _recorded(
        self, prompt: str | list[int], number: int, index: int
    ) -> list[tuple[Sample, GenerationConfig]]:
        """Writes the tail history of a sample, with those of --compare."""
        generator, flags, runs, samples = self._generator, self._flags, [], []
        text = self._text(prompt)
        for which, (title, settings) in enumerate(self._variants):
            found = generator.record(prompt, settings, number, flags.seed, keep_vectors=flags.keep_vectors,
                                     direction=self._direction)
            if flags.trajectory is not None:
                path = numbered(flags.trajectory, index * len(self._variants) + which,
                                self._total * len(self._variants))
                with writing("--trajectory", path):
                    found.save(path)
            runs.append(Run(title, found, dataclasses.asdict(settings) | {"seed": flags.seed, "sample": number}))
            samples.append((sample_of_trajectory(generator.tokenizer, text, number, found), settings))
        if flags.html is not None:
            path = numbered(flags.html, index, self._total)
            with writing("--html", path):
                path.write_text(replay(f"{flags.workdir}: {text}", runs, generator.tokenizer), encoding="utf-8")
        return samples


@contextlib.contextmanager
def opened(output: str | None) -> Iterator[TextIO | None]:
    """The file of --output, opened before generation starts."""
    if output is None:
        yield None
        return
    try:
        with Path(output).open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise refusal(error, f"--output: cannot write {output}", Path(output)) from None


def check(flags: Args) -> None:
    """Raises UserError if a flag is out of range or has no effect."""
    counts(flags.num_samples, flags.seed, flags.batch_size)
    if flags.compare and not (flags.show_tail or flags.html is not None):
        raise UserError("--compare shows samples side by side: add --show-tail or --html FILE")
    if flags.keep_vectors and flags.trajectory is None:
        raise UserError("--keep-vectors has no effect without --trajectory FILE: add it")
    if flags.compare and flags.stream:
        raise UserError("--stream shows one run: for --compare take --show-tail or --html FILE")


def files_of(flags: Args, num_samples: int, num_variants: int) -> dict[str, list[Path]]:
    """The files that will be written, by flag; raises UserError if a path has no file name."""
    files = {"--output": [Path(flags.output)] if flags.output is not None else []}
    for flag, path, total in (("--html", flags.html, num_samples),
                              ("--trajectory", flags.trajectory, num_samples * num_variants)):
        if path is not None and Path(path).name in ("", ".."):
            raise UserError(f"{flag}: {path!r} names no file")
        files[flag] = [] if path is None else [numbered(path, index, total) for index in range(total)]
    return files


def main(args: Sequence[str]) -> None:
    """Generates the samples that `args` describe."""
    flags = parse_for_run(args)
    check(flags)
    asked = read_prompts(flags)
    use_compilation_cache(load_config(Path(flags.workdir)).compute)
    generator = Generator.from_workdir(flags.workdir)
    prompts = [as_chat(one, generator.tokenizer) if flags.chat or not isinstance(one, str) else one for one in asked]
    variants = make_variants(args, flags, generator)
    direction = steering_vector(flags)
    for _, settings in variants:
        generator.check(prompts, settings, direction)
    check_files(files_of(flags, len(prompts) * flags.num_samples, len(variants)),
                {"--prompts-file": flags.prompts_file, "--steering-vector": flags.steering_vector})
    written: list[list[Sample]] = [[] for _ in variants]
    with opened(flags.output) as out:
        for sample, settings in Writing(generator, prompts, variants, flags, direction).samples():
            written[[one for _, one in variants].index(settings)].append(sample)
            if out is not None:
                row = dataclasses.asdict(sample) | {"seed": flags.seed, "settings": dataclasses.asdict(settings)}
                if flags.steering_vector is not None:
                    row["steering_vector"] = flags.steering_vector
                print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
    for (title, settings), samples in zip(variants, written, strict=True):
        if settings.commit != "front" and samples:
            named = f"{title}: " if title else ""
            print(f"{named}committed when {settings.commit}: {_of_passes(samples)}", file=sys.stderr)


def _of_passes(samples: Sequence[Sample]) -> str:
    """A line with the mean number of tokens per pass, and how often each draft was right; the settings are the same."""
    tokens, passes = sum(len(one.tokens) for one in samples), sum(one.passes for one in samples)
    right = np.array([one.accepted for one in samples]).sum(axis=0)
    drafts = f"; drafts that were right, the nearest first: {', '.join(f'{one / passes:.0%}' for one in right)}"
    return f"{tokens} tokens in {passes} passes, {tokens / passes:.2f} a pass{drafts * bool(right.size)}"
