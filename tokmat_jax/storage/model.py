"""The whole model of a workdir.

A run with an adapter stores only what it has trained, and names its base: the workdir of the model that it started
from, and the fingerprint of that model's parameters.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from tokmat_jax.config import Config
from tokmat_jax.errors import UserError
from tokmat_jax.model.backbone import Params
from tokmat_jax.model.lora import fold_adapter, join_params, split_params
from tokmat_jax.model.params import param_shapes
from tokmat_jax.storage.checkpoint import load_params
from tokmat_jax.storage.files import read_json, write_json
from tokmat_jax.storage.integrity import summed
from tokmat_jax.storage.workdir import BASE, load_config


def fingerprint(params: Params) -> str:
    """A digest of all bits of `params` (JAX arrays); every process of a run must call it."""
    return hashlib.sha256(json.dumps(summed(params), sort_keys=True).encode()).hexdigest()[:32]


def load_model(workdir: Path, config: Config, vocab_size: int, where: Mesh | Sharding) -> tuple[Params, int]:
    """All parameters of the newest checkpoint of `workdir`, placed on a mesh or by one sharding, and its step.

    Raises UserError as `load_params` does; and if the run has an adapter, when its base is gone or another one.
    """
    trained, frozen = split_params(param_shapes(config, vocab_size, where), config)
    params, step = load_params(workdir, trained)
    if not frozen:
        return params, step
    return join_params(load_base(workdir, config, frozen, vocab_size, where), params), step


def save_base(workdir: Path, config: Config, mark: str) -> None:
    """Notes which model a run with an adapter starts from: `config.init_from`, with the fingerprint `mark`."""
    write_json(workdir / BASE, {"init_from": config.init_from, "fingerprint": mark})


def load_base(workdir: Path, config: Config, shapes: Params, vocab_size: int, where: Mesh | Sharding) -> Params:
    """The parameters `shapes` of the model that the adapter in `workdir` belongs to.

    Raises UserError if that model is gone, or is not the one that the adapter was trained for.
    """
    known = read_json(workdir / BASE).get("fingerprint")
    path = Path(str(config.init_from))
    if not path.is_dir():
        raise UserError(f"{workdir} holds an adapter of the model in {path}, which is gone: put it back, or import it "
                        f"there again")
    base, _ = load_plain(path, vocab_size, where)
    if (found := fingerprint(base)) != known:
        raise UserError(f"{workdir} holds an adapter of another model than the one in {path}: its fingerprint is "
                        f"{found}, the adapter was trained for {known}")
    return _leaves_of(base, shapes)


def load_plain(workdir: Path, vocab_size: int, where: Mesh | Sharding) -> tuple[Params, Config]:
    """The model of `workdir` and its config; an adapter is folded into the matrices (`fold_adapter`)."""
    config = load_config(workdir)
    return fold_adapter(load_model(workdir, config, vocab_size, where)[0], config)


def _leaves_of(tree: Any, shapes: Any) -> Any:
    """The leaves of `tree` that `shapes` names; of FiLM's rows, as many as it asks for."""
    if isinstance(shapes, dict):
        return {name: _leaves_of(tree[name], inner) for name, inner in shapes.items()}
    if tree.shape == shapes.shape:
        return tree
    return jax.device_put(tree[tuple(map(slice, shapes.shape))], shapes.sharding)
