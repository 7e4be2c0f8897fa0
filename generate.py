"""Write text with a trained model: python generate.py --workdir runs/quickstart --prompt "In the beginning"

With --show-tail the tail is drawn while it thinks; with --output every sample goes to a JSONL file.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro

from tokmat_jax.cli import parse, run_script
from tokmat_jax.config import GenerationConfig, Profile
from tokmat_jax.errors import UserError
from tokmat_jax.generator import Generator, Moment, Sample
from tokmat_jax.view.terminal import show_tail, stream_text, visible


@dataclass(frozen=True)
class Args:
    """Continue prompts with a trained model. A flag left out takes the run's own setting."""

    workdir: str
    """Folder of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times, and may be empty (starts from end-of-text)."""
    prompts_file: str | None = None
    """One prompt per line (blank lines are skipped), or JSONL with a field `prompt`."""
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
    rate: float | None = None
    """η of the front slot, in [0, 1]; left out everywhere, a slot's rate is its maturity."""
    tail_noise: float | None = None
    """σ of the embryos in units of R."""
    history_noise: float | None = None
    """σ_h, norm in units of R of the noise added to a vector when it enters the history; 0 is off."""
    repulsion: float | None = None
    """ρ, how far predictions are pushed away from what was committed in like places (0.2 to 0.8); 0 is off."""
    repulsion_sharpness: float | None = None
    """b, how alike two predictions must be to count as the same place."""
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
    """Draw committed text and tail at every step."""


_SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
_TAIL_FLAGS = ("tail_length", "guidance_scale", "profile", "max_maturity", "rate", "tail_noise", "history_noise")


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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f"--prompts-file: {path} line {number} is no JSON object with a text field 'prompt'")
        yield prompt


def make_settings(args: Args, generator: Generator) -> GenerationConfig:
    """The run's settings with the flags given; says on standard error where K is new to the model."""
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if generator.is_autoregressive:
        for name in _TAIL_FLAGS:
            if name in given:
                raise UserError(f"--{name.replace('_', '-')}: {args.workdir} is an autoregressive baseline, "
                                f"it has no tail")
    settings = dataclasses.replace(generator.settings, **given)
    trained = generator.config.maturation.max_tail_length
    if settings.tail_length > trained and not generator.is_autoregressive:
        print(f"note: a tail of {settings.tail_length} is longer than any in training (K_max {trained})",
              file=sys.stderr)
    return settings


def watched(generator: Generator, prompts: Sequence[str], settings: GenerationConfig, flags: Args) -> Iterator[Sample]:
    """Shows every sample while it comes into being."""
    for prompt in prompts:
        for number in range(flags.num_samples):
            moments: list[Moment] = []
            passing = _remembered(generator.stream(prompt, settings, number, flags.seed), moments)
            if flags.show_tail:
                show_tail(prompt, passing, generator.tokenizer)
            else:
                stream_text(prompt, passing)
            yield generator.sample_of(prompt, number, moments)


def _remembered(moments: Iterator[Moment], seen: list[Moment]) -> Iterator[Moment]:
    for moment in moments:
        seen.append(moment)
        yield moment


def printed(generator: Generator, prompts: Sequence[str], settings: GenerationConfig, flags: Args) -> Iterator[Sample]:
    """Prints every sample when its batch is complete."""
    several = len(prompts) * flags.num_samples > 1
    at_once = max(1, flags.batch_size // flags.num_samples)
    for begin in range(0, len(prompts), at_once):
        batch = prompts[begin : begin + at_once]
        for sample in generator.generate(batch, settings, flags.num_samples, flags.seed, flags.batch_size):
            print(visible(sample.prompt + sample.text) + ("\n---" if several else ""), flush=True)
            yield sample


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
        raise UserError(f"--output: cannot write {output}: {error.strerror}") from None


def main(args: Sequence[str]) -> None:
    """Generates what `args` ask for."""
    flags = parse(Args, args)
    if min(flags.num_samples, flags.batch_size) < 1 or not 0 <= flags.seed < 2**32:
        raise UserError(f"--num-samples and --batch-size must be at least 1 and --seed in 0..2³²−1, found "
                        f"{flags.num_samples}, {flags.batch_size} and {flags.seed}")
    prompts = read_prompts(flags)
    generator = Generator.from_workdir(flags.workdir)
    settings = make_settings(flags, generator)
    generator.rows(prompts, settings)
    with opened(flags.output) as out:
        samples = watched if flags.stream or flags.show_tail else printed
        for sample in samples(generator, prompts, settings, flags):
            if out is not None:
                row = dataclasses.asdict(sample) | {"seed": flags.seed, "settings": dataclasses.asdict(settings)}
                print(json.dumps(row, ensure_ascii=False), file=out, flush=True)


if __name__ == "__main__":
    run_script(main)
