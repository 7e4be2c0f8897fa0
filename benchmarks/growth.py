"""Growth: the time per token with the length of the history, and a training step over more devices.

    python benchmarks/growth.py

Decoding: K slots after histories of several lengths, which take turns; only the steps are timed, not the pass over the
prompt. A history is as long as its capacity (a power of two, `buckets.py`), since invisible positions are scored as
well. "by operations" is the growth of the time per token if it were proportional to operations; only the operations of
attention depend on the history.

Training: the same batches over 1 to 8 devices that one CPU simulates. They share its cores, so they are not expected to
be faster, but the losses must be equal and each must compile once. A line of JSON follows the card.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from decoding import Stepping, make_generator, prompts_of
from side_by_side import machine, median, ratio, take_turns, words_of

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.config import Config, DataConfig, GenerationConfig, ModelConfig, ObjectiveConfig, TrainConfig
from tokmat_jax.distributed.mesh import make_mesh
from tokmat_jax.errors import UserError
from tokmat_jax.keys import seed_key
from tokmat_jax.training.step import make_train_functions

DEVICES = (1, 2, 4, 8)
ACCURACY = 1e-5


@dataclass(frozen=True)
class Args:
    """Measure growth with the history and with devices."""

    embed_dim: int = 768
    """Width of the model that decodes."""
    num_layers: int = 12
    """Its blocks."""
    num_heads: int = 12
    """Its attention heads."""
    vocab_size: int = 50_257
    """V."""
    tail_length: int = 16
    """K."""
    shortest: int = 64
    """Shortest history; the others are longer by powers of 4."""
    longest: int = 1024
    """Longest history."""
    new_tokens: int = 16
    """Tokens per round."""
    rounds: int = 9
    """Rounds per history."""
    steps: int = 3
    """Training steps for each number of devices."""
    devices: int | None = None
    """Internal: passed from the benchmark to its processes."""


def histories(flags: Args) -> list[int]:
    """Lengths S, shortest first."""
    lengths = [flags.shortest]
    while 4 * lengths[-1] <= flags.longest:
        lengths.append(4 * lengths[-1])
    return lengths


def step_weights(model: ModelConfig) -> int:
    """Number of weights in the matrices that a query passes in decoding: blocks (with GELU), conditioning and head."""
    size = model.embed_dim
    block = 2 * size * (model.head_size * (model.num_heads + model.kv_heads) + model.mlp_size)
    return model.num_layers * block + 3 * size * size


def step_flops(model: ModelConfig, vocab_size: int, tail_length: int, history: float) -> dict[str, float]:
    """Operations of a step of one row: `attention` over `history` and the K slots, and the `rest`.

    Two per weight and query, and two per entry of the vocabulary table for the front. The products of attention with
    keys and with values take 4 H D per query and key.
    """
    width = model.num_heads * model.head_size
    return {"attention": 4.0 * model.num_layers * width * tail_length * (history + tail_length),
            "rest": 2.0 * step_weights(model) * tail_length + 2.0 * vocab_size * model.embed_dim}


def over_history(flags: Args) -> dict[str, Any]:
    """Measures and prints the time per token after each history."""
    model = ModelConfig(embed_dim=flags.embed_dim, num_layers=flags.num_layers, num_heads=flags.num_heads)
    lengths = histories(flags)
    config = Config(data=DataConfig(seq_len=lengths[-1] + flags.new_tokens + flags.tail_length), model=model)
    generator = make_generator(config, flags.vocab_size)
    settings = GenerationConfig(tail_length=flags.tail_length, max_new_tokens=flags.new_tokens)
    works = {str(length): Stepping(generator, prompts_of(flags.vocab_size, 1, length), settings) for length in lengths}
    found = take_turns(works, flags.rounds)
    print(f"decoding, {flags.num_layers} layers of {flags.embed_dim}, V {flags.vocab_size:,}, K = {flags.tail_length}, "
          f"{flags.rounds} rounds of {flags.new_tokens} tokens\n"
          f"       S   capacity   ms/token   × shortest   × by operations   attention's share of them")
    rows, first = [], None
    for name, work in works.items():
        flops = step_flops(model, flags.vocab_size, flags.tail_length, work.capacity)
        total = sum(flops.values())
        first = first or total
        row = {"history": int(name), "capacity": work.capacity, "flops": flops,
               "seconds_per_token": median(found, name) / flags.new_tokens,
               "growth": ratio(found, str(lengths[0]), name), "growth_by_operations": total / first,
               "attention_share": flops["attention"] / total}
        rows.append(row)
        print(f"  {name:>6}{work.capacity:11,}{1e3 * row['seconds_per_token']:11.1f}{row['growth']['median']:11.2f} ×"
              f"{row['growth_by_operations']:16.2f} ×{100 * row['attention_share']:26.1f} %")
    return {"rows": rows, "found": found}


def small_config() -> Config:
    """The config that is trained over several devices."""
    return Config(data=DataConfig(seq_len=64), model=ModelConfig(embed_dim=64, num_layers=2, num_heads=4),
                  objective=ObjectiveConfig(num_negatives=64), train=TrainConfig(batch_size=8))


def train_here(config: Config, vocab_size: int, steps: int) -> dict[str, Any]:
    """The losses of `steps` updates over all devices of this process, and the number of compilations of the step."""
    mesh = make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    unigram = np.full(vocab_size, 1 / vocab_size, np.float32)
    losses = []
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, vocab_size, mesh)
        state = functions.init(seed_key(0))
        for _ in range(steps):
            ids = rng.integers(0, vocab_size, (config.train.batch_size, config.data.seq_len)).astype(np.int32)
            state, metrics = functions.step(state, ids, unigram)
            losses.append(float(metrics["loss"]))
        compilations = functions.step._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    return {"devices": jax.device_count(), "losses": losses, "compilations": compilations}


def pretended(count: int) -> dict[str, str]:
    """Environment variables of a process in which the CPU simulates `count` devices."""
    flag = "--xla_force_host_platform_device_count"
    others = [word for word in os.environ.get("XLA_FLAGS", "").split() if not word.startswith(flag)]
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, f"{flag}={count}"])}


def train_over(count: int, flags: Args) -> dict[str, Any]:
    """Runs `train_here` in a process with `count` devices."""
    command = [sys.executable, __file__, *words_of(flags), "--devices", str(count)]
    done = subprocess.run(command, env=pretended(count), text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(f"training over {count} devices has stopped with exit code {done.returncode}: see above")
    return json.loads(done.stdout.splitlines()[-1])


def over_devices(flags: Args) -> list[dict[str, Any]]:
    """Trains over each number of devices and prints the results."""
    print(f"training, {flags.steps} steps of one batch of {small_config().train.batch_size} over pretended devices\n"
          f"   devices   compilations   last loss   from that of one device (aim ≤ {ACCURACY:g})")
    rows: list[dict[str, Any]] = []
    for count in DEVICES:
        row = train_over(count, flags)
        last = row["losses"][-1]
        rows.append(row | {"off": abs(last / (rows[0]["losses"][-1] if rows else last) - 1.0)})
        right = rows[-1]["off"] <= ACCURACY and row["compilations"] == 1
        print(f"  {row['devices']:8}{row['compilations']:15}{last:12.6f}{rows[-1]['off']:12.1e}"
              f"  {'reached' if right else 'not reached'}", flush=True)
    return rows


def main(args: Sequence[str]) -> None:
    """Prints the card, or runs as one of its processes."""
    flags = parse(Args, args)
    if flags.devices is not None:
        print(json.dumps(train_here(small_config(), 512, flags.steps)))
        return
    history, devices = over_history(flags), over_devices(flags)
    print(json.dumps({"benchmark": "growth", "history": history, "devices": devices, "settings": asdict(flags),
                      "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
