"""An adapter as the PEFT library stores it: `adapter_config.json` and `adapter_model.safetensors` in one folder.

An export writes the adapter of a run; an import merges one into its base as the weights are read.

PEFT has a place for low-rank adapters of matrices alone. What maturation adds beside them (head, conditioning, κ) is
not in it: for a maturation run the folder is a part of the model, and a merged export (`convert.export_weights`) keeps
everything.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.distributed.mesh import path_name
from tokmat_jax.errors import UserError, shown
from tokmat_jax.hf import families
from tokmat_jax.hf.files import Safetensors, Stored
from tokmat_jax.storage.files import appears_whole, read_json, write_json
from tokmat_jax.storage.model import load_model
from tokmat_jax.storage.workdir import TOKENIZER, load_config

ADAPTER = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PART = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter: W + s B A in the place of each of its matrices W."""

    folder: Path
    base: str
    """What it adapts: a folder, or a name on the hub."""
    scale: float
    """s."""
    transposed: bool
    """Whether the matrices are stored as [in, out], as GPT-2's are."""
    parts: dict[str, dict[str, np.ndarray]]
    """A [r, in] and B [out, r] by the name of the matrix."""


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`; raises UserError if it is damaged or of a kind that is not W + s B A."""
    facts, where = read_json(folder / ADAPTER), folder / ADAPTER
    base, rank, alpha = (facts.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha"))
    if facts.get("peft_type") != "LORA" or facts.get("use_dora") or facts.get("bias", "none") != "none":
        raise UserError(f"{where}: only plain LoRA is merged here (peft_type LORA, no use_dora, bias none): merge it "
                        f"with PEFT first")
    if facts.get("rank_pattern") or facts.get("alpha_pattern") or facts.get("modules_to_save"):
        raise UserError(f"{where}: rank_pattern, alpha_pattern and modules_to_save are not supported: merge it with "
                        f"PEFT first")
    if not isinstance(base, str) or type(rank) is not int or rank < 1 or not (
            isinstance(alpha, int | float) and np.isfinite(alpha)):
        raise UserError(f"{where} is damaged: base_model_name_or_path, r and lora_alpha are "
                        f"{shown((base, rank, alpha))}")
    stored = Safetensors(folder, _WEIGHTS)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in stored.shapes:
        found = _PART.fullmatch(name)
        if found is None:
            raise UserError(f"{folder / _WEIGHTS}: {shown(name)} is no part of a low-rank adapter: merge it with PEFT "
                            f"first")
        parts.setdefault(f"{found[1]}.weight", {})[found[2]] = stored.read(name)
    for name, pair in parts.items():
        if pair.keys() != {"A", "B"} or any(one.ndim != 2 for one in pair.values()) or (
                pair["A"].shape[0] != rank or pair["B"].shape[1] != rank):
            raise UserError(f"{folder / _WEIGHTS} is damaged: {name} has no A [{rank}, in] and B [out, {rank}]")
    near = folder / base
    scale = float(alpha) / (rank**0.5 if facts.get("use_rslora") else rank)
    return Adapter(folder, str(near) if near.is_dir() else base, scale, bool(facts.get("fan_in_fan_out")), parts)


class Merged:
    """Stored weights with an adapter merged into them as they are read."""

    def __init__(self, base: Stored, adapter: Adapter):
        self._base, self._adapter = base, adapter
        self.shapes, self.dtype, self.notes = base.shapes, base.dtype, base.notes
        for name, pair in adapter.parts.items():
            delta = (pair["B"].shape[0], pair["A"].shape[1])
            wanted = delta[::-1] if adapter.transposed else delta
            if base.shapes.get(name) != wanted:
                raise UserError(f"{adapter.folder} is no adapter of {adapter.base}: it changes {name} of shape "
                                f"{wanted}, the base has {shown(base.shapes.get(name))}")

    def read(self, name: str) -> np.ndarray:
        """The weight `name` with what the adapter adds."""
        weight, pair = self._base.read(name), self._adapter.parts.get(name)
        if pair is None:
            return weight
        delta = np.float32(self._adapter.scale) * (pair["B"] @ pair["A"])
        return weight + (delta.T if self._adapter.transposed else delta)


def export_adapter(workdir: Path, out: Path) -> dict[str, Any]:
    """Writes the adapter of the run in `workdir` into the folder `out`, which must not exist; returns its config.

    Raises UserError if the run has no adapter, and if the family stores several adapted matrices as one, so that they
    cannot have an adapter each.
    """
    config = load_config(workdir)
    adapter = config.adapter
    if not adapter.rank:
        raise UserError(f"{workdir} has no low-rank adapter (adapter.rank {adapter.rank}): leave out --adapter")
    vocab_size = load_tokenizer(workdir / TOKENIZER).vocab_size
    params, _ = load_model(workdir, config, vocab_size, jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]))
    flat = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    stored, targets, model_type = {}, set(), families.family_of(config).model_type
    for weight in families.weights(model_type, config.model, config.table.tied):
        ours, *others = (path.removesuffix("/kernel") for path in weight.paths)
        if not any(f"{path}/lora_a" in flat for path in (ours, *others)):
            continue
        if others:
            raise UserError(f"{model_type} stores {', '.join(weight.paths)} as one matrix, {weight.name}, which PEFT "
                            f"gives one adapter: leave out query, key and value from adapter.matrices, or export "
                            f"without --adapter")
        module = weight.name.removesuffix(".weight")
        targets.add(module.rpartition(".")[2])
        for layer in range(config.model.num_layers):
            for name, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
                stored[f"base_model.model.{module.format(layer=layer)}.{name}.weight"] = np.ascontiguousarray(
                    flat[f"{ours}/{leaf}"][layer].T)
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.init_from,
               "r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "lora_dropout": adapter.dropout,
               "target_modules": sorted(targets), "bias": "none", "fan_in_fan_out": model_type == "gpt2",
               "inference_mode": True}
    with appears_whole(out) as folder:
        safetensors.numpy.save_file(stored, folder / _WEIGHTS, metadata={"format": "pt"})
        write_json(folder / ADAPTER, written)
    return written
