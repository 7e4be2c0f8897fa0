"""An adapter as the PEFT library stores it: `adapter_config.json` and `adapter_model.safetensors` in one folder.

PEFT has a place for low-rank adapters of matrices alone. What maturation adds beside them (head, conditioning, κ) is
not in it: for a maturation run the folder is a part of the model, and a merged export (`convert.export_weights`) keeps
everything.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.distributed.mesh import path_name
from tokmat_jax.errors import UserError
from tokmat_jax.hf import families
from tokmat_jax.storage.files import appears_whole, write_json
from tokmat_jax.storage.model import load_model
from tokmat_jax.storage.workdir import TOKENIZER, load_config


def export_adapter(workdir: Path, out: Path) -> dict[str, Any]:
    """Writes the adapter of the run in `workdir` into the folder `out`, which must not exist; returns its config.

    Raises UserError if the run has no adapter, if its adapter acts at slots alone, and if the family stores several
    adapted matrices as one, so that they cannot have an adapter each.
    """
    config = load_config(workdir)
    adapter = config.adapter
    if not adapter.rank:
        raise UserError(f"{workdir} has no low-rank adapter (adapter.rank {adapter.rank}): leave out --adapter")
    if config.objective.kind == "tail":
        raise UserError(f"{workdir} holds a tail in front of the model in {config.init_from}; its adapters act at "
                        f"slots alone, for which PEFT has no place")
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
        safetensors.numpy.save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", written)
    return written
