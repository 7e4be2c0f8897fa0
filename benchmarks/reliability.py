"""What holds after hours: the memory, the compilations and the speed of a process that lives long.

    python benchmarks/reliability.py --what long-life

Requests of mixed shape are answered in one process; once every bucket of shapes has been compiled, nothing more is, and
resident memory stays where it is. Then `train.py` makes many steps of a tiny model, with all that happens in between
(rows, validation, samples, checkpoints): its memory is looked at ten times a second, and the time of a step is read off
its rows. A line of JSON follows the card.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from decoding import make_generator
from growth import pretended
from side_by_side import machine

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.config import Config, DataConfig, GenerationConfig, ModelConfig
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator

ROOT = Path(__file__).resolve().parent.parent
BATCHES, PROMPTS, NEW_TOKENS = (1, 2, 4, 8), (16, 32), (4, 8, 16)
"""The largest request of every bucket that is asked for: rows, ids of a prompt, new tokens."""

KINDS = (
    GenerationConfig(tail_length=4),
    GenerationConfig(tail_length=8, guidance_scale=2.0),
    GenerationConfig(tail_length=4, repulsion=0.4, commit="stable", max_commit=3, patience=0, tolerance=0.9),
)
"""Settings that compile programs of their own; the numbers in them do not."""


@dataclass(frozen=True)
class Args:
    """Find out whether a process lasts."""

    what: Literal["long-life"] = "long-life"
    """What is tried."""
    requests: int = 2000
    """Requests for text, of 1 to 8 prompts each."""
    steps: int = 20_000
    """Training steps."""
    embed_dim: int = 64
    """Width of the model that writes."""
    num_layers: int = 2
    """Its blocks."""
    vocab_size: int = 512
    """Its V."""


def resident_bytes(process: int | str = "self") -> int:
    """Memory of a process that is in RAM now, 0 where it has ended. Raises UserError on a system that does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        raise UserError("needs /proc, to read how much memory a process has now") from None
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def watch(command: Sequence[str], begun: Path) -> list[int]:
    """Runs `command`; returns its memory, looked at every tenth of a second from when the file `begun` has a line.

    Not the peak that a process knows of itself: that of a new process begins with its parent's.
    """
    memory = []
    with subprocess.Popen(command, cwd=ROOT, env=pretended(1), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if begun.exists() and begun.stat().st_size and (now := resident_bytes(process.pid)):
                memory.append(now)
            time.sleep(0.1)
    if process.returncode:
        raise UserError(f"training has stopped with exit code {process.returncode}: see above")
    return memory


def position_bytes(model: ModelConfig) -> int:
    """Bytes of the keys and values of one position."""
    return 2 * 4 * model.num_layers * model.kv_heads * model.head_size


def request(rng: np.random.Generator, vocab_size: int) -> tuple[list[list[int]], GenerationConfig]:
    """Prompts and settings of a request within the buckets."""
    prompts = [rng.integers(1, vocab_size, rng.integers(1, PROMPTS[-1] + 1)).tolist()
               for _ in range(rng.integers(1, BATCHES[-1] + 1))]
    kind = KINDS[rng.integers(len(KINDS))]
    varied = replace(kind, max_new_tokens=int(rng.integers(1, NEW_TOKENS[-1] + 1)),
                     tail_noise=float(rng.uniform(0.0, 1.0)), max_maturity=float(rng.uniform(0.5, 1.0)))
    return prompts, varied if kind.guidance_scale == 1.0 else replace(
        varied, guidance_scale=float(rng.uniform(1.5, 3.0)))


def warm_up(generator: Generator) -> int:
    """Asks for the largest request of every bucket; returns how much has been compiled then."""
    for kind, rows, length, new in itertools.product(KINDS, BATCHES, PROMPTS, NEW_TOKENS):
        generator.generate([[1] * length] * rows, replace(kind, max_new_tokens=new))
    return generator.compilations()


def course(values: Sequence[float]) -> dict[str, float]:
    """A quantity after a tenth, half and all of the way, and its `slope` from the first tenth to the end."""
    late = values[len(values) // 10 :]
    return {"tenth": values[len(values) // 10], "half": values[len(values) // 2], "end": values[-1],
            "growth": values[-1] - values[len(values) // 10],
            "slope": float(np.polyfit(np.arange(len(late)), late, 1)[0])}


def generation(flags: Args) -> dict[str, Any]:
    """Answers the requests; `memory` is in bytes, its `slope` in bytes per request, and `kept_state` is what one
    request would leave behind, on average, if the last state of its decoder were not given back."""
    model = ModelConfig(embed_dim=flags.embed_dim, num_layers=flags.num_layers, num_heads=2)
    generator = make_generator(Config(data=DataConfig(seq_len=64), model=model), flags.vocab_size)
    warm, rng = warm_up(generator), np.random.default_rng(0)
    memory, tokens, rows = [], 0, 0
    for seed in range(flags.requests):
        prompts, settings = request(rng, flags.vocab_size)
        samples = generator.generate(prompts, settings, seed=seed)
        tokens, rows = tokens + sum(len(sample.tokens) for sample in samples), rows + len(samples)
        memory.append(resident_bytes())
    return {"warm_compilations": warm, "later_compilations": generator.compilations() - warm, "tokens": tokens,
            "memory": course(memory), "kept_state": rows / flags.requests * 64 * position_bytes(model)}


def write_text(path: Path) -> None:
    """About 200 kB of documents without sense."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(500)]
    documents = [" ".join(rng.choice(words, rng.integers(20, 200))) for _ in range(350)]
    path.write_text("<|endoftext|>".join(documents))


def training_flags(folder: Path, steps: int) -> list[str]:
    """The command line of a run with a hundred rows, and twenty times everything that is rarer."""
    flags = {"workdir": folder / "run", "data.source": f"files:{folder}/text.txt", "data.prepared-dir": folder,
             "data.seq-len": 32, "tokenizer.kind": "bytes", "model.embed-dim": 16, "model.num-layers": 1,
             "model.num-heads": 2, "objective.num-negatives": 16, "train.batch-size": 4, "train.num-steps": steps,
             "train.log-every": max(1, steps // 100), "train.eval-batches": 2, "train.num-samples": 1,
             "generation.tail-length": 4, "generation.max-new-tokens": 8, "mesh.data": 1}
    rarely = {f"train.{name}-every": max(1, steps // 20) for name in ("eval", "sample", "checkpoint")}
    return [word for name, value in (flags | rarely).items() for word in (f"--{name}", str(value))]


def training(flags: Args) -> dict[str, Any]:
    """Trains in a process of its own; `memory` is in bytes, its `slope` in bytes per tenth of a second, and `slowdown`
    the time of a step in the last tenth of all rows over that in the second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        written = folder / "run" / "metrics.jsonl"
        memory = watch([sys.executable, str(ROOT / "train.py"), *training_flags(folder, flags.steps)], written)
        lines = written.read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/step_seconds" in row]
    seconds, tenth = [row["train/step_seconds"] for row in rows], len(rows) // 10
    second, last = (float(np.median(part)) for part in (seconds[tenth : 2 * tenth], seconds[-tenth:]))
    return {"steps": rows[-1]["step"], "memory": course(memory),
            "step_seconds": {"second_tenth": second, "last_tenth": last}, "slowdown": last / second}


def print_memory(found: dict[str, float], unit: str) -> None:
    """A line of the card."""
    tenth, half, end = (found[name] / 1e6 for name in ("tenth", "half", "end"))
    print(f"  memory after 10 %, 50 %, 100 %    {tenth:8.1f} {half:8.1f} {end:8.1f} MB   "
          f"{found['slope'] / 1e3:+.2f} kB {unit}")


def long_life(flags: Args) -> dict[str, Any]:
    """Both, printed on the way."""
    written = generation(flags)
    print(f"generation, {flags.num_layers} layers of {flags.embed_dim}, {flags.requests:,} requests, "
          f"{written['tokens']:,} tokens")
    print_memory(written["memory"], "a request")
    print(f"  compilations                      {written['warm_compilations']:8} to warm up, "
          f"{written['later_compilations']} later (aim 0)", flush=True)
    trained = training(flags)
    print(f"training, {trained['steps']:,} steps of a tiny model")
    print_memory(trained["memory"], "a tenth of a second")
    print(f"  a step of the last tenth          {1e3 * trained['step_seconds']['last_tenth']:8.2f} ms, "
          f"{trained['slowdown']:.2f} × one of the second")
    return {"generation": written, "training": trained}


MODES: dict[str, Callable[[Args], dict[str, Any]]] = {"long-life": long_life}


def main(args: Sequence[str]) -> None:
    """Prints the card."""
    flags = parse(Args, args)
    found = MODES[flags.what](flags)
    print(json.dumps({"benchmark": "reliability", **found, "settings": asdict(flags), "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
