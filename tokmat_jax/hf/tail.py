"""A tail in front of a language model as a file of a few MB: `tail.json` and `tail.safetensors`, beside a card.

It goes in front of the model that it was trained for, which is recognised by a digest of the weights that came from its
checkpoint. The package ships the tails in `tails/`.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from tokmat_jax.config import Config, DataConfig, TokenizerConfig
from tokmat_jax.config.saved import parse_config_json
from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.distributed.mesh import path_name
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.hf.convert import nested
from tokmat_jax.model.lora import ADDED, split_params
from tokmat_jax.model.params import param_shapes
from tokmat_jax.storage.checkpoint import load_params, save_params
from tokmat_jax.storage.files import appears_whole, read_json, write_json
from tokmat_jax.storage.model import fingerprint, load_plain, save_base
from tokmat_jax.storage.workdir import TOKENIZER, load_config, save_config

SHIPPED = Path(__file__).resolve().parents[1] / "tails"
_FACTS, _WEIGHTS = "tail.json", "tail.safetensors"


@dataclass(frozen=True)
class Found:
    """A tail in a folder."""

    folder: Path
    config: Config
    """That of the run that trained it."""
    mark: str
    """Digest of the weights that it goes in front of."""


def export_tail(workdir: Path, out: Path) -> dict[str, Any]:
    """Writes the tail that the run in `workdir` trained into the folder `out`, in bfloat16; returns its `numbers` and
    its `step`. Raises UserError if the run has no checkpoint, or if `out` exists."""
    config = load_config(workdir)
    vocab_size = load_tokenizer(workdir / TOKENIZER).vocab_size
    trained, _ = split_params(param_shapes(config, vocab_size, _here()), config)
    params, step = load_params(workdir, trained)
    base, _ = load_plain(Path(str(config.init_from)), vocab_size, _here())
    flat = {path_name(path): np.asarray(leaf).astype(ml_dtypes.bfloat16)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    facts = {"weights": mark_of(base), "step": step, "config": dataclasses.asdict(_anywhere(config))}
    with appears_whole(out) as folder:
        safetensors.numpy.save_file(flat, folder / _WEIGHTS)
        write_json(folder / _FACTS, facts)
    return {"numbers": sum(array.size for array in flat.values()), "step": step}


def _anywhere(config: Config) -> Config:
    """`config` without the paths of the machine on which it was trained."""
    return dataclasses.replace(
        config, workdir="tail", init_from="base", tokenizer=TokenizerConfig(kind="workdir", name="base"),
        data=DataConfig(seq_len=config.data.seq_len, holdout=config.data.holdout))


def read_tail(folder: Path) -> Found:
    """The tail in `folder`; raises UserError if there is none."""
    facts = read_json(folder / _FACTS)
    if not isinstance(facts.get("weights"), str):
        raise UserError(f"{folder / _FACTS} is damaged: it does not say which weights the tail belongs to")
    config = parse_config_json(json.dumps(facts.get("config")), str(folder / _FACTS))
    if config.objective.kind != "tail":
        raise UserError(f"{folder / _FACTS} is damaged: its config is of the kind {config.objective.kind!r}")
    return Found(folder, config, facts["weights"])


def mark_of(params: Any) -> str:
    """A digest of the weights of a language model, without what its import added to them."""
    digest = hashlib.sha256()
    own = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
           if not re.search(ADDED, path_name(path))}
    for path in sorted(own):
        array = np.ascontiguousarray(own[path])
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()[:32]


def shipped_tail(workdir: Path) -> Found | None:
    """The shipped tail that goes in front of the import in `workdir`, None if there is none."""
    config = load_config(workdir)
    for folder in sorted(SHIPPED.iterdir()) if SHIPPED.is_dir() else ():
        if not (folder / _FACTS).is_file():
            continue
        found = read_tail(folder)
        if found.config.model == config.model and found.mark == mark_of(_model(workdir)):
            return found
    return None


def put_in_front(base: Path, out: Path, source: Path | None = None) -> Found:
    """Makes the workdir `out`: the language model in `base` with the tail in the folder `source`, or the shipped one.

    Raises UserError if `base` is no language model, if no tail is shipped for it, or if the tail is another one's.
    """
    config = load_config(base)
    if config.objective.kind != "ar":
        raise UserError(f"{base} is a run of the kind {config.objective.kind!r}; a tail goes in front of a language "
                        f"model")
    found = shipped_tail(base) if source is None else read_tail(source)
    if found is None:
        raise UserError(f"no tail is shipped for the model in {base}: train one (train.py --init-from {base} "
                        f"--objective.kind tail), or give a folder with --source")
    params = _model(base)
    if mark_of(params) != found.mark:
        raise UserError(f"the tail in {found.folder} belongs to another model than the one in {base}")
    its = found.config
    config = dataclasses.replace(
        config, workdir=str(out), init_from=str(base), adapter=its.adapter, maturation=its.maturation,
        objective=its.objective, generation=its.generation)
    tokenizer = load_tokenizer(base / TOKENIZER)
    trained, _ = split_params(param_shapes(config, tokenizer.vocab_size, _here()), config)
    flat = _read(found.folder / _WEIGHTS, {path_name(path): leaf.shape for path, leaf in
                                           jax.tree_util.tree_leaves_with_path(trained)})
    with appears_whole(out) as unfinished:
        save_config(config, unfinished)
        tokenizer.save(unfinished / TOKENIZER)
        save_params(unfinished, nested({path: jax.device_put(array) for path, array in flat.items()}))
        save_base(unfinished, config, fingerprint(params))
    return found


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The weights in `file` as float32; raises UserError unless they have the `shapes`."""
    try:
        flat = {path: array.astype(np.float32) for path, array in safetensors.numpy.load_file(file).items()}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}; fetch it again") from None
    wrong = [path for path in {**flat, **shapes} if path not in flat or shapes.get(path) != flat[path].shape]
    if wrong:
        raise UserError(f"{file} is damaged: {wrong[0]} is missing or does not fit {_FACTS}; fetch it again")
    return flat


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _model(workdir: Path) -> Any:
    return load_plain(workdir, load_tokenizer(workdir / TOKENIZER).vocab_size, _here())[0]
