"""Memory, compilations and speed of a process that runs for a long time.

    python benchmarks/reliability.py --what long-life

One process answers requests of mixed shapes. After every bucket of shapes is compiled, there must be no further
compilations, and resident memory must stay constant. Then `train.py` makes many steps of a tiny model, with rows,
validation, samples and checkpoints in between: its memory is sampled ten times a second, and the time of a step is
taken from its rows. A line of JSON follows the card.
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
"""Sizes of the largest request in each bucket: rows, ids of a prompt, new tokens."""

KINDS = (
    GenerationConfig(tail_length=4),
    GenerationConfig(tail_length=8, guidance_scale=2.0),
    GenerationConfig(tail_length=4, repulsion=0.4, commit="stable", max_commit=3, patience=0, tolerance=0.9),
)
"""Settings that need separate compiled programs; changing only their numbers needs no compilation."""


@dataclass(frozen=True)
class Args:
    """Check the memory and speed of long-running processes."""

    what: Literal["long-life"] = "long-life"
    """The check to run."""
    requests: int = 2000
    """Number of requests for text, of 1 to 8 prompts each."""
    steps: int = 20_000
    """Number of training steps."""
    embed_dim: int = 64
    """Width of the model that generates."""
    num_layers: int = 2
    """Its blocks."""
    vocab_size: int = 512
    """Its V."""


def resident_bytes(process: int | str = "self") -> int:
    """Current resident memory of a process, 0 if it has ended. Raises UserError if the system does not report it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        raise UserError("needs /proc, to read how much memory a process has now") from None
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def watch(command: Sequence[str], begun: Path) -> list[int]:
    """Runs `command`; returns its memory every tenth of a second, starting when the file `begun` has a line.

    The peak that the system reports is not used: for a new process it starts at the value of its parent.
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
    """Bytes of keys and values per position."""
    return 2 * 4 * model.num_layers * model.kv_heads * model.head_size


def request(rng: np.random.Generator, vocab_size: int) -> tuple[list[list[int]], GenerationConfig]:
    """Random prompts and settings of a request within the buckets."""
    prompts = [rng.integers(1, vocab_size, rng.integers(1, PROMPTS[-1] + 1)).tolist()
               for _ in range(rng.integers(1, BATCHES[-1] + 1))]
    kind = KINDS[rng.integers(len(KINDS))]
    varied = replace(kind, max_new_tokens=int(rng.integers(1, NEW_TOKENS[-1] + 1)),
                     tail_noise=float(rng.uniform(0.0, 1.0)), max_maturity=float(rng.uniform(0.5, 1.0)))
    return prompts, varied if kind.guidance_scale == 1.0 else replace(
        varied, guidance_scale=float(rng.uniform(1.5, 3.0)))


def warm_up(generator: Generator) -> int:
    """Makes the largest request of every bucket; returns the number of compilations so far."""
    for kind, rows, length, new in itertools.product(KINDS, BATCHES, PROMPTS, NEW_TOKENS):
        generator.generate([[1] * length] * rows, replace(kind, max_new_tokens=new))
    return generator.compilations()


def course(values: Sequence[float]) -> dict[str, float]:
    """A quantity after a tenth, half and all of its values, and its `slope` from the first tenth to the end."""
    late = values[len(values) // 10 :]
    return {"tenth": values[len(values) // 10], "half": values[len(values) // 2], "end": values[-1],
            "growth": values[-1] - values[len(values) // 10],
            "slope": float(np.polyfit(np.arange(len(late)), late, 1)[0])}


def generation(flags: Args) -> dict[str, Any]:
    """Answers the requests; `memory` is in bytes, its `slope` in bytes per request, and `kept_state` is the mean number
    of bytes that a request would leak if the last state of its decoder were not freed."""
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
    """Writes about 200 kB of random documents."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(500)]
    documents = [" ".join(rng.choice(words, rng.integers(20, 200))) for _ in range(350)]
    path.write_text("<|endoftext|>".join(documents))


def training_flags(folder: Path, steps: int) -> list[str]:
    """Flags of a run that writes a hundred rows and does each rarer action twenty times."""
    flags = {"workdir": folder / "run", "data.source": f"files:{folder}/text.txt", "data.prepared-dir": folder,
             "data.seq-len": 32, "tokenizer.kind": "bytes", "model.embed-dim": 16, "model.num-layers": 1,
             "model.num-heads": 2, "objective.num-negatives": 16, "train.batch-size": 4, "train.num-steps": steps,
             "train.log-every": max(1, steps // 100), "train.eval-batches": 2, "train.num-samples": 1,
             "generation.tail-length": 4, "generation.max-new-tokens": 8, "mesh.data": 1}
    rarely = {f"train.{name}-every": max(1, steps // 20) for name in ("eval", "sample", "checkpoint")}
    return [word for name, value in (flags | rarely).items() for word in (f"--{name}", str(value))]


def training(flags: Args) -> dict[str, Any]:
    """Trains in a separate process; `memory` is in bytes, its `slope` in bytes per tenth of a second, and `slowdown` is
    the time of a step in the last tenth of all rows divided by that in the second tenth."""
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
    """Prints a line of the card."""
    tenth, half, end = (found[name] / 1e6 for name in ("tenth", "half", "end"))
    print(f"  memory after 10 %, 50 %, 100 %    {tenth:8.1f} {half:8.1f} {end:8.1f} MB   "
          f"{found['slope'] / 1e3:+.2f} kB {unit}")


def long_life(flags: Args) -> dict[str, Any]:
    """Runs generation and training, and prints the results."""
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
