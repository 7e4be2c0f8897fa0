"""Write text with a trained model: python generate.py --workdir runs/quickstart --prompt "In the beginning"

With --show-tail the tail is drawn while it thinks; with --output every sample goes to a JSONL file.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tokmat_jax.cli import parse, run_script
from tokmat_jax.config import GenerationConfig, Profile
from tokmat_jax.errors import UserError
from tokmat_jax.generator import Generator, Sample
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
    """α_max, maturity and rate of the front slot, in [0, 1]."""
    tail_noise: float | None = None
    """σ of the embryos in units of R."""
    entropy_temperature: float | None = None
    """τ of the reported entropy of softmax(cos/τ)."""
    num_samples: int = 1
    """Samples per prompt; they differ by the noise of their embryos."""
    seed: int = 0
    batch_size: int = 16
    """Samples that run together; changes the speed, not the samples."""
    output: str | None = None
    """JSONL file: text, tokens, and entropy and movement per token."""
    stream: bool = False
    """Print the text while it is committed."""
    show_tail: bool = False
    """Draw committed text and tail at every step."""


_SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
_TAIL_FLAGS = ("tail_length", "guidance_scale", "profile", "max_maturity", "tail_noise")


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
    settings = dataclasses.replace(generator.config.generation, **given)
    trained = generator.config.maturation.max_tail_length
    if settings.tail_length > trained and not generator.is_autoregressive:
        print(f"note: a tail of {settings.tail_length} is longer than any in training (K_max {trained})",
              file=sys.stderr)
    return settings


def record(sample: Sample, settings: GenerationConfig, seed: int) -> dict[str, object]:
    """A sample as a row of --output."""
    return dataclasses.asdict(sample) | {"seed": seed, "settings": dataclasses.asdict(settings)}


def watch(generator: Generator, prompts: Sequence[str], settings: GenerationConfig, flags: Args) -> None:
    """Shows every sample while it comes into being."""
    for prompt in prompts:
        for number in range(flags.num_samples):
            moments = generator.stream(prompt, settings, number, flags.seed)
            if flags.show_tail:
                show_tail(prompt, moments, generator.tokenizer)
            else:
                stream_text(prompt, moments)


def write_samples(path: Path, samples: Sequence[Sample], settings: GenerationConfig, seed: int) -> None:
    """Writes --output; raises UserError where it cannot."""
    try:
        with path.open("w", encoding="utf-8") as out:
            for sample in samples:
                print(json.dumps(record(sample, settings, seed), ensure_ascii=False), file=out)
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def main(args: Sequence[str]) -> None:
    """Generates what `args` ask for."""
    flags = parse(Args, args)
    if min(flags.num_samples, flags.batch_size) < 1 or flags.seed < 0:
        raise UserError(f"--num-samples and --batch-size must be at least 1 and --seed at least 0, found "
                        f"{flags.num_samples}, {flags.batch_size} and {flags.seed}")
    prompts = read_prompts(flags)
    generator = Generator.from_workdir(flags.workdir)
    settings = make_settings(flags, generator)
    live = flags.stream or flags.show_tail
    if live:
        watch(generator, prompts, settings, flags)
    if live and flags.output is None:
        return
    samples = generator.generate(prompts, settings, flags.num_samples, flags.seed, flags.batch_size)
    if flags.output is not None:
        write_samples(Path(flags.output), samples, settings, flags.seed)
    if not live:
        for sample in samples:
            print(visible(sample.prompt + sample.text))
            if len(samples) > 1:
                print("---")


if __name__ == "__main__":
    run_script(main)
