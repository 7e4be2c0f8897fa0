"""Utilisation of the hardware in training: operations per token, peak of the devices, memory.

A token costs 6 operations per weight of the matrices it passes (2 forward, 4 backward: Kaplan et al. 2020,
arXiv:2001.08361, §2.1), and its attention 12 · L · H · D per position it sees, on average (T + 1)/2 of them (Chowdhery
et al. 2022, arXiv:2204.02311, appendix B, who count all T). Recomputation by `compute.remat` is not counted, nor are
norms, softmax, GELU, embeddings and the optimiser: docs/scaling.md compares this to the compiler's count.
"""

import re
import resource
import sys

import jax

from tokmat_jax.config import Config

PEAK: tuple[tuple[str, float], ...] = (
    (r"NVIDIA (GB200|B200)", 2.25e15),
    (r"NVIDIA H100 PCIe", 7.56e14),
    (r"NVIDIA (H100|H200|GH200)", 9.89e14),
    (r"NVIDIA A100", 3.12e14),
    (r"NVIDIA L40S", 3.62e14),
    (r"NVIDIA L4$", 1.21e14),
    (r"TPU v6 lite|TPU v6e", 9.18e14),
    (r"TPU v5 lite|TPU v5e", 1.97e14),
    (r"TPU v5p?$", 4.59e14),
    (r"TPU v4$", 2.75e14),
)
"""Dense bfloat16 operations per second by kind of device, from the makers' data sheets; the first match counts."""


def matrix_weights(config: Config, vocab_size: int) -> int:
    """Number of weights in the matrices that a token passes once in training, including the rows of the readout."""
    model, size = config.model, config.model.embed_dim
    attention = 2 * size * model.head_size * (model.num_heads + model.kv_heads)
    mlp = (3 if model.gated else 2) * size * model.mlp_size
    conditioning = 2 * size * size
    head = size * size if model.head == "linear" else 0
    everything = config.objective.kind == "ar" or config.objective.negatives in ("full", "weighted")
    rows = vocab_size if everything else config.objective.num_negatives
    return model.num_layers * (attention + mlp) + conditioning + head + size * rows


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Operations of a training step per token of the windows.

    A backward pass counts as two forward passes. With self-conditioning, each row, or each of the M tails beside a
    window, has a second forward pass. In front of a language model the window has a forward pass alone, and no gradient
    of its matrices is computed.
    """
    model, seen = config.model, (config.data.seq_len + 1) / 2
    attention = 12.0 * model.num_layers * model.num_heads * model.head_size * seen
    flops = 6.0 * matrix_weights(config, vocab_size) + attention
    kind, settings = config.objective.kind, config.maturation
    again = flops / 3 if kind != "ar" and settings.self_condition_prob > 0 else 0.0
    slots = settings.num_tails * settings.max_tail_length / config.data.seq_len
    if kind == "tail":
        return flops / 3 + slots * (flops * 2 / 3 + again)
    if kind == "maturation" and settings.num_tails > 0:
        return flops + slots * (flops + again)
    return flops + again


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of a device in operations per second; None if it is unknown or `dtype` is not bfloat16."""
    if dtype != "bfloat16":
        return None
    return next((peak for pattern, peak in PEAK if re.match(pattern, device_kind)), None)


def measures(config: Config, vocab_size: int, steps_per_second: float) -> dict[str, float]:
    """`tokens_per_second` of all devices together, `step_seconds`, and `mfu`, the share of the peak, if the peak is
    known."""
    tokens = steps_per_second * config.train.batch_size * config.data.seq_len
    found = {"tokens_per_second": tokens, "step_seconds": 1.0 / steps_per_second}
    if (peak := peak_flops(jax.devices()[0].device_kind, config.model.dtype)) is not None:
        found["mfu"] = tokens * flops_per_token(config, vocab_size) / (peak * jax.device_count())
    return found


def memory() -> dict[str, float]:
    """Peak memory use so far, in GB: `device_memory_gb` of the fullest device of this process, if devices report it,
    and `host_memory_gb` of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    told = [stats["peak_bytes_in_use"] for device in jax.local_devices()
            if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats]
    return ({"device_memory_gb": max(told) / 1e9} if told else {}) | {"host_memory_gb": peak / 1e9}
