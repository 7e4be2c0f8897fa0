"""A GPU or a TPU: training as a share of the measured peak, decoding against a roofline, cuDNN's attention.

    python benchmarks/accelerator.py

The peak of the device is measured in the same call: operations per second of large square bfloat16 products, and bytes
per second when an array is read and written. Timings never include a compilation.

Training (350M class, bfloat16, uniform negatives) counts, per token,

    6 · weights + 12 · L · T · d

operations. `weights` counts the matrices that a token passes (blocks, conditioning, head) and the rows of sampled
negatives that it is compared with; the rest of the table is looked up, not multiplied. This is the usual count, in
which attention sees all T positions. Causal attention sees (T + 1) / 2 of them on average: `causal` counts those, as
`train.py` does (tokmat_jax/training/throughput.py). Neither counts recomputation in the backward pass.

A step of decoding takes at least the larger of

    (weights + table + visible keys and values) in bytes / bytes per second
    (2 · weights · B · K + 2 · V · d · B + 4 · L · H · D · K · (S + K) · B) / operations per second

with 2 bytes (bfloat16) per weight, key and value and 4 per number of the table, since tokens are read in float32. S is
the history in the middle of the round. The last column is the measured time of a step divided by this bound.

On NVIDIA GPUs, training alternates between cuDNN's attention and XLA's. A line of JSON follows the card.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decoding import Stepping, make_generator, prompts_of
from growth import step_flops, step_weights
from side_by_side import machine, median, ratio, take_turns

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.config import (
    AttentionKernel,
    Config,
    DataConfig,
    GenerationConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from tokmat_jax.distributed.mesh import make_mesh, put_rows, put_whole
from tokmat_jax.errors import UserError
from tokmat_jax.keys import seed_key
from tokmat_jax.training.step import make_train_functions
from tokmat_jax.training.throughput import flops_per_token, matrix_weights

AIM = 0.45


@dataclass(frozen=True)
class Args:
    """Measure training and decoding on an accelerator."""

    batch_size: int = 16
    """Windows per training step."""
    seq_len: int = 1024
    """T, tokens per window."""
    embed_dim: int = 1024
    """Width."""
    num_layers: int = 24
    """Blocks."""
    num_heads: int = 16
    """Attention heads."""
    vocab_size: int = 50_257
    """V."""
    steps: int = 8
    """Training steps of a round."""
    history: int = 256
    """S, committed positions before a round of decoding."""
    new_tokens: int = 16
    """Tokens of a round of decoding."""
    rounds: int = 7
    """Rounds of every measurement."""


def config_of(flags: Args) -> Config:
    """The model that `flags` describe, in bfloat16."""
    return Config(
        data=DataConfig(seq_len=flags.seq_len),
        model=ModelConfig(embed_dim=flags.embed_dim, num_layers=flags.num_layers, num_heads=flags.num_heads,
                          dtype="bfloat16"),
        objective=ObjectiveConfig(negatives="uniform", num_negatives=256),
        train=TrainConfig(batch_size=flags.batch_size),
    )


def with_attention(config: Config, kernel: AttentionKernel) -> Config:
    """`config` with `kernel` for attention."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention=kernel))


def repeated(work: Callable[[], Any], count: int) -> Callable[[], None]:
    """`work` repeated `count` times, dispatched to the device without waiting in between."""
    def run() -> None:
        last = None
        for _ in range(count):
            last = work()
        jax.block_until_ready(last)

    return run


def matmul_peak(sizes: Sequence[int], rounds: int, count: int = 20) -> dict[str, Any]:
    """`flops`, the highest operations per second of square bfloat16 products, and the figure for each of `sizes`."""
    multiply = jax.jit(jnp.matmul)
    works = {}
    for size in sizes:
        square = jax.random.normal(seed_key(size), (size, size), jnp.bfloat16)
        works[str(size)] = repeated(lambda square=square: multiply(square, square), count)
    found = take_turns(works, rounds)
    rates = {name: 2.0 * int(name) ** 3 * count / median(found, name) for name in works}
    return {"flops": max(rates.values()), "by_size": rates}


def copy_bandwidth(size: int, rounds: int, count: int = 20) -> float:
    """Bytes per second for an array of `size` bytes that is read once and written once."""
    array = jnp.zeros(size // 4, jnp.float32)
    # XLA may remove or alias a plain copy.
    add = jax.jit(lambda x: x + 1.0)
    found = take_turns({"copy": repeated(lambda: add(array), count)}, rounds)
    return 2.0 * array.nbytes * count / median(found, "copy")


def training_flops(config: Config, vocab_size: int) -> dict[str, float]:
    """Operations of a training step per token: `weights`, `negatives` and `attention` of the formula above, their
    `total`, and `causal`, the total if attention counts only visible positions."""
    model = config.model
    rows = 6.0 * config.objective.num_negatives * model.embed_dim
    weights = 6.0 * matrix_weights(config, vocab_size) - rows
    attention = 12.0 * model.num_layers * config.data.seq_len * model.embed_dim
    return {"weights": weights, "negatives": rows, "attention": attention, "total": weights + rows + attention,
            "causal": flops_per_token(config, vocab_size)}


def training(config: Config, vocab_size: int, steps: int) -> Callable[[], None]:
    """`steps` training steps on one batch that is already on the devices."""
    mesh = make_mesh(config.mesh)
    rows, shape = slice(0, config.train.batch_size), (config.train.batch_size, config.data.seq_len)
    ids = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, vocab_size, mesh)
        held = [functions.init(seed_key(0))]
        batch = put_rows(ids, rows, config.train.batch_size, mesh)
        unigram = put_whole(np.full(vocab_size, 1 / vocab_size, np.float32), mesh)

    def work() -> None:
        state = held.pop()
        with jax.set_mesh(mesh):
            for _ in range(steps):
                state, _ = functions.step(state, batch, unigram)
        held.append(jax.block_until_ready(state))

    return work


def measure_training(
    config: Config, vocab_size: int, kernels: Sequence[AttentionKernel], steps: int, rounds: int, peak: float
) -> dict[str, Any]:
    """Tokens per second with each of `kernels` for attention, and their share of `peak` per device."""
    found = take_turns({kernel: training(with_attention(config, kernel), vocab_size, steps) for kernel in kernels},
                       rounds)
    flops, tokens = training_flops(config, vocab_size), config.train.batch_size * config.data.seq_len * steps
    rates = {kernel: tokens / median(found, kernel) for kernel in kernels}
    whole = peak * jax.device_count()
    return {"tokens_per_second": rates, "flops_per_token": flops, "found": found,
            "share": {kernel: rate * flops["total"] / whole for kernel, rate in rates.items()},
            "causal_share": {kernel: rate * flops["causal"] / whole for kernel, rate in rates.items()}}


@dataclass(frozen=True)
class Roofline:
    """Lower bound for a step of decoding."""

    bytes: float
    """Bytes that must be read."""
    flops: float
    """Operations that must be computed."""
    seconds: float
    """The longer of the two resulting times."""


def roofline(
    model: ModelConfig, vocab_size: int, batch_size: int, tail_length: int, history: float, bandwidth: float,
    peak: float,
) -> Roofline:
    """The formula above, for `batch_size` rows with a history of `history` positions each."""
    operations = step_flops(model, vocab_size, tail_length, history)
    seen = 2.0 * batch_size * history * model.num_layers * model.kv_heads * model.head_size
    moved = 2.0 * step_weights(model) + 4.0 * vocab_size * model.embed_dim + 2.0 * seen
    flops = batch_size * sum(operations.values())
    return Roofline(moved, flops, max(moved / bandwidth, flops / peak))


def measure_decoding(
    config: Config, vocab_size: int, batch_size: int, tail_length: int, history: int, new_tokens: int, rounds: int,
    bandwidth: float, peak: float,
) -> dict[str, Any]:
    """Seconds of a step, its roofline, which is computed before the timing, and their ratio."""
    least = roofline(config.model, vocab_size, batch_size, tail_length, history + (new_tokens - 1) / 2, bandwidth, peak)
    settings = GenerationConfig(tail_length=tail_length, max_new_tokens=new_tokens)
    generator = make_generator(config, vocab_size)
    steps = Stepping(generator, prompts_of(vocab_size, batch_size, history), settings)
    found = take_turns({"steps": steps}, rounds)
    seconds = median(found, "steps") / new_tokens
    return {"batch_size": batch_size, "tail_length": tail_length, "roofline": asdict(least), "seconds": seconds,
            "times_roofline": seconds / least.seconds, "capacity": steps.capacity, "found": found}


def print_training(measured: dict[str, Any]) -> None:
    """Prints the card's part on training."""
    flops = measured["flops_per_token"]
    print(f"  {flops['total'] / 1e9:.3f} GFLOP per token: weights {flops['weights'] / 1e9:.3f}, negatives "
          f"{flops['negatives'] / 1e9:.3f}, attention {flops['attention'] / 1e9:.3f}; causal "
          f"{flops['causal'] / 1e9:.3f}")
    for kernel, rate in measured["tokens_per_second"].items():
        share = measured["share"][kernel]
        print(f"  attention {kernel:6}{rate:12,.0f} tokens/s  {100 * share:5.1f} % of the measured peak "
              f"({100 * measured['causal_share'][kernel]:.1f} % causal)   aim ≥ {100 * AIM:g} %: "
              f"{'' if share >= AIM else 'not '}reached")


def print_decoding(row: dict[str, Any]) -> None:
    """Prints a line of the card's part on decoding."""
    least = row["roofline"]
    print(f"  {row['batch_size']:5}{row['tail_length']:5}{least['bytes'] / 1e9:10.2f} GB"
          f"{least['flops'] / 1e12:12.4f} TFLOP{1e3 * least['seconds']:9.3f} ms{1e3 * row['seconds']:11.3f} ms"
          f"{row['times_roofline']:10.2f} ×", flush=True)


def main(args: Sequence[str]) -> None:
    """Prints the card; raises UserError if there is no accelerator."""
    flags = parse(Args, args)
    if jax.default_backend() == "cpu":
        raise UserError("needs an accelerator, found cpu")
    config, vocab_size = config_of(flags), flags.vocab_size
    peak = matmul_peak((4096, 8192, 16384), flags.rounds)
    bandwidth = copy_bandwidth(1 << 30, flags.rounds)
    print(f"{jax.devices()[0].device_kind}: {peak['flops'] / 1e12:.1f} TFLOP/s in bfloat16 products, "
          f"{bandwidth / 1e9:,.0f} GB/s read and written")
    kernels: tuple[AttentionKernel, ...] = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    print(f"training, {flags.num_layers} layers of {flags.embed_dim}, V {vocab_size:,}, {flags.batch_size} × "
          f"{flags.seq_len} tokens, {flags.rounds} rounds of {flags.steps} steps")
    trained = measure_training(config, vocab_size, kernels, flags.steps, flags.rounds, peak["flops"])
    print_training(trained)
    cudnn = ratio(trained["found"], "cudnn", "xla") if "cudnn" in kernels else None
    if cudnn is not None:
        print(f"  with cuDNN's attention {cudnn['median']:.2f} × as fast ({cudnn['low']:.2f}–{cudnn['high']:.2f})")
    print(f"decoding, S = {flags.history}, {flags.rounds} rounds of {flags.new_tokens} tokens\n"
          f"      B    K        bytes        operations    roofline        a step   over it")
    rows = []
    for batch_size in (1, 256):
        for tail_length in (1, 16):
            rows.append(measure_decoding(config, vocab_size, batch_size, tail_length, flags.history, flags.new_tokens,
                                         flags.rounds, bandwidth, peak["flops"]))
            print_decoding(rows[-1])
    print(json.dumps({"benchmark": "accelerator", "peak": peak, "bandwidth": bandwidth, "training": trained,
                      "cudnn_to_xla": cudnn, "decoding": rows, "settings": asdict(flags), "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
