"""A training step: maturation against our autoregressive baseline against `transformers` in torch.

    pip install -e '.[parity]' && python benchmarks/training.py

All three use the same shape (by default GPT-2 small), batch, optimiser (AdamW, clipping) and machine, in float32. They
take turns, each in its own process; a line of JSON follows the card.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from side_by_side import alternate, machine, print_ratio, ratio, serve

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.keys import seed_key

NAMES = ("maturation", "ar", "torch")


@dataclass(frozen=True)
class Args:
    """Time training steps side by side."""

    batch_size: int = 4
    """Windows per step."""
    seq_len: int = 256
    """Tokens per window."""
    embed_dim: int = 768
    """Width."""
    num_layers: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads."""
    vocab_size: int = 50_257
    """V."""
    rounds: int = 7
    """Rounds, of one step per contestant."""
    contestant: str | None = None
    """Internal: passed from the benchmark to its processes."""


def ours(flags: Args, kind: Any) -> Callable[[], float]:
    """A step of this library with the objective `kind`, as in `train.py`."""
    import jax

    from tokmat_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
    from tokmat_jax.distributed.mesh import make_mesh
    from tokmat_jax.training.step import make_train_functions

    config = Config(
        data=DataConfig(seq_len=flags.seq_len),
        model=ModelConfig(embed_dim=flags.embed_dim, num_layers=flags.num_layers, num_heads=flags.num_heads),
        objective=ObjectiveConfig(kind=kind), train=TrainConfig(batch_size=flags.batch_size),
    )
    mesh = make_mesh(config.mesh)
    ids = windows(flags)
    unigram = np.full(flags.vocab_size, 1 / flags.vocab_size, np.float32)
    with jax.set_mesh(mesh):
        functions = make_train_functions(config, flags.vocab_size, mesh)
        held = [functions.init(seed_key(0))]

    def step() -> float:
        with jax.set_mesh(mesh):
            state, metrics = functions.step(held.pop(), ids, unigram)
        held.append(state)
        return float(metrics["loss"])

    return step


def in_torch(flags: Args) -> Callable[[], float]:
    """A step of GPT-2 in `transformers`, without dropout because our model has none."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=flags.vocab_size, n_positions=flags.seq_len, n_embd=flags.embed_dim, n_layer=flags.num_layers,
        n_head=flags.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    ids = torch.from_numpy(windows(flags)).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def windows(flags: Args) -> np.ndarray:
    """Random ids [B, T]."""
    return np.random.default_rng(0).integers(0, flags.vocab_size, (flags.batch_size, flags.seq_len)).astype(np.int32)


def main(args: Sequence[str]) -> None:
    """Prints the card, or runs as one of the contestants."""
    flags = parse(Args, args)
    if flags.contestant is not None:
        serve(in_torch(flags) if flags.contestant == "torch" else ours(flags, flags.contestant))
        return
    settings = [word for name, value in asdict(flags).items() if value is not None
                for word in (f"--{name.replace('_', '-')}", str(value))]
    found = alternate(__file__, NAMES, settings, flags.rounds)
    tokens = flags.batch_size * flags.seq_len
    print(f"training step, {flags.num_layers} layers of {flags.embed_dim}, V {flags.vocab_size:,}, "
          f"{flags.batch_size} × {flags.seq_len} tokens, {flags.rounds} rounds")
    for name in NAMES:
        rate = tokens / statistics.median(found[name]["seconds"])
        print(f"  {name:12}{rate:10,.0f} tokens/s{found[name]['peak_bytes'] / 1e9:10.2f} GB peak")
    ratios = {"maturation_to_ar": ratio(found, "maturation", "ar"), "ar_to_torch": ratio(found, "ar", "torch"),
              "maturation_to_torch": ratio(found, "maturation", "torch")}
    print_ratio("maturation against our autoregressive step", ratios["maturation_to_ar"], 1.25)
    print_ratio("our autoregressive step against torch", ratios["ar_to_torch"], 1.0)
    print(json.dumps({"benchmark": "training", "ratios": ratios, "found": found, "settings": asdict(flags),
                      "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
