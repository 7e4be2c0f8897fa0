"""Converts a checkpoint to a workdir, and a workdir to a checkpoint.

What a checkpoint has no place for (conditioning on maturity and tail length, the head, free rows of the table, κ) is
written to a folder `maturation/` beside the exported weights. An import restores it from there, bit for bit.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tokmat_jax.config import (
    Config,
    DataConfig,
    GenerationConfig,
    MaturationConfig,
    ModelConfig,
    ObjectiveConfig,
    TableConfig,
    TokenizerConfig,
)
from tokmat_jax.config.saved import parse_config_json
from tokmat_jax.data.tokenizer import Tokenizer, hugging_face, load_tokenizer
from tokmat_jax.distributed.mesh import path_name
from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.hf import families
from tokmat_jax.hf.families import Weight
from tokmat_jax.hf.files import Safetensors, Stored, find_source, write_safetensors
from tokmat_jax.hf.gguf_file import Gguf, parts_of
from tokmat_jax.hf.names import layers_of, match_names
from tokmat_jax.hf.peft import ADAPTER, Merged, read_adapter
from tokmat_jax.hf.settings import write_settings
from tokmat_jax.keys import seed_key
from tokmat_jax.model.backbone import Params, conditioning_of_committed
from tokmat_jax.model.params import ar_logit_scale_of, init_params, param_shapes, vocabulary_of
from tokmat_jax.output import without_torch_notice
from tokmat_jax.progress import bar
from tokmat_jax.storage.checkpoint import save_params
from tokmat_jax.storage.files import appears_whole, read_json, write_json
from tokmat_jax.storage.model import load_plain
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.storage.workdir import IMPORTED, TOKENIZER, load_config, save_config

_ROUNDING = 1e-6
"""A factor that differs from 1 by less than this is 1, rounded."""
SIDECAR = "maturation"
"""Folder of an exported checkpoint: `run.json`, `weights.safetensors` and `tokenizer/`."""
_RUN, _WEIGHTS = "run.json", "weights.safetensors"
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Flat = dict[str, np.ndarray]
"""Parameters by path, `backbone/blocks/query/kernel`."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Imported:
    """Facts about an import; stored as `imported.json` in the workdir."""

    source: str
    model_type: str
    dtype: str
    """Type of the stored weights."""
    num_parameters: int
    """Number of parameters in the checkpoint."""
    row_norm: tuple[float, float, float]
    """Smallest, mean and largest norm of the table's rows."""
    notes: tuple[str, ...]
    """What was left out, in words."""


@dataclass(frozen=True)
class _Sidecar:
    config: Config
    tokenizer: Tokenizer
    params: Flat
    derived: dict[str, str]
    """Checksum of each stored weight that was computed from `params`."""


@dataclass(frozen=True)
class _Source:
    stored: Stored
    model_type: str
    config: Config
    tokenizer: Tokenizer
    tied: bool
    notes: tuple[str, ...]
    sidecar: _Sidecar | None


def import_weights(source: str, out: Path) -> Imported:
    """Makes the workdir `out` from a folder of safetensors, a hub name, a GGUF file, package:NAME or a PEFT adapter.

    Weights are checked by name, shape and finiteness, and read one at a time. If the source is damaged, incomplete or
    of a kind that the backbone cannot express, raises UserError and leaves no files.
    """
    with appears_whole(out) as unfinished:
        plain_path(unfinished)  # refused before anything is read
        found = _open(find_source(source), out)
        shapes = _shapes(found.config, found.tokenizer.vocab_size)
        weights = families.weights(found.model_type, found.config.model, found.tied)
        names, renamed = match_names(found.stored, found.model_type, found.config, found.tied, weights, shapes)
        flat = _read(found, weights, names, shapes)
        config, norms = found.config, np.linalg.norm(flat["table"], axis=-1)
        row_norm = (float(norms.min()), float(norms.mean()), float(norms.max()))
        if found.sidecar is None:  # R is the length of a typical row; so far, input_norm is the factor of the rows
            input_norm = config.model.input_norm * row_norm[1]
            config = dataclasses.replace(config, table=dataclasses.replace(config.table, radius=row_norm[1]),
                                         model=dataclasses.replace(config.model, input_norm=input_norm))
        facts = Imported(source, found.model_type, found.stored.dtype,
                         sum(int(np.prod(shape)) for shape in found.stored.shapes.values()), row_norm,
                         (*found.notes, *found.stored.notes, *renamed))
        save_config(config, unfinished)
        found.tokenizer.save(unfinished / TOKENIZER)
        write_json(unfinished / IMPORTED, dataclasses.asdict(facts))
        save_flat(unfinished, flat)
    return facts


def _open(path: Path, out: Path) -> _Source:
    """The checkpoint at `path`: a GGUF file, a folder with nothing else, an adapter and its base, or a folder."""
    if path.is_file():
        return _open_gguf(path, out)
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        adapter = read_adapter(path)
        found = find_source(adapter.base)
        if (found / ADAPTER).is_file() and not (found / "config.json").is_file():
            raise UserError(f"{path} adapts {adapter.base}, which is an adapter itself: merge that one first")
        base = _open(found, out)
        return dataclasses.replace(base, stored=Merged(base.stored, adapter), sidecar=None, notes=(
            *base.notes, f"the adapter in {path} is merged into {adapter.base}"))
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return _open_gguf(files[0], out) if files and set(parts_of(files[0])) == set(files) else _open_folder(path, out)


def _open_folder(folder: Path, out: Path) -> _Source:
    with without_torch_notice():
        from transformers import AutoConfig

    facts = read_json(folder / "config.json")
    _check_model_type(facts.get("model_type"), folder / "config.json")
    for field in families.LISTED:
        families.check_count(facts.get(field, 0), field, folder / "config.json")
    try:
        settings: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, tied = families.read_settings(settings)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {one_line(error)}") from None
    stored = Safetensors(folder)
    sidecar = _read_sidecar(folder / SIDECAR) if (folder / SIDECAR).is_dir() else None
    if sidecar is not None:
        return _Source(stored, settings.model_type, dataclasses.replace(sidecar.config, workdir=str(out)),
                       sidecar.tokenizer, tied, (), sidecar)
    loaded = _folder_tokenizer(folder)
    generation = _generation(folder)
    loaded.origin = dataclasses.replace(loaded.origin, generation=generation)
    ends = _ends(generation.get("eos_token_id", settings.eos_token_id), loaded.end_of_text, folder)
    tokenizer = _fit(loaded, ends, settings.vocab_size, folder)
    return _Source(stored, settings.model_type, _plain_config(model, tied, out), tokenizer, tied, (), None)


def _open_gguf(file: Path, out: Path) -> _Source:
    if file.suffix != ".gguf":
        raise UserError(f"SOURCE {str(file)!r} is a file but no .gguf; give the folder of a checkpoint")
    stored = Gguf(file)
    settings, loaded = stored.settings(), stored.tokenizer()
    model, tied = families.read_settings(settings)
    tokenizer = _fit(loaded, [*loaded.ends], settings.vocab_size, file)
    return _Source(stored, stored.model_type, _plain_config(model, tied, out), tokenizer, tied, (), None)


def _check_model_type(found: Any, path: Path) -> None:
    if not isinstance(found, str) or found not in families.FAMILIES:
        raise UserError(f"{path}: model_type {shown(found)} is not supported; supported are "
                        f"{', '.join(families.FAMILIES)}")


def _folder_tokenizer(folder: Path) -> Tokenizer:
    # If its files are missing, transformers silently builds an empty tokenizer.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    return hugging_face(str(folder))


def _generation(folder: Path) -> dict[str, Any]:
    """The checkpoint's generation_config.json, {} if it has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _ends(found: Any, of_tokenizer: int, where: Path) -> list[int]:
    """The ids at which text ends, the one that separates documents first; `found` is an id, several, or None."""
    several = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(end, int) for end in several):
        raise UserError(f"{where} is damaged: eos_token_id = {shown(found)} is no id")
    first = of_tokenizer if of_tokenizer in several or not several else several[0]
    return [first, *(end for end in several if end != first)]


def _fit(loaded: Tokenizer, ends: list[int], num_rows: int, where: Path) -> Tokenizer:
    """The tokenizer with V = `num_rows` ids, whose samples end at `ends`."""
    if not all(0 <= one < num_rows for one in loaded.prefix):
        raise UserError(f"{where}: text begins with the ids {shown(loaded.prefix)}, the table has {num_rows} rows")
    end_of_text = ends[0]
    if not all(0 <= end < num_rows for end in ends):
        raise UserError(f"{where}: text ends at the ids {shown(ends)}, the table has {num_rows} rows")
    try:
        return Tokenizer(loaded.fast, end_of_text, loaded.prefix, num_rows, ends, loaded.origin)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain_config(model: ModelConfig, tied: bool, out: Path) -> Config:
    """The checkpoint as a config: an autoregressive run over the raw table."""
    positions = model.max_positions
    assert positions is not None
    if positions < 4:
        raise UserError(f"config.json: a model of {positions} positions is too short")
    window = min(256, positions)
    return Config(
        workdir=str(out), data=DataConfig(seq_len=window), tokenizer=TokenizerConfig(kind="workdir", name=str(out)),
        table=TableConfig(geometry="raw", tied=tied), model=model,
        maturation=MaturationConfig(max_tail_length=min(16, window - 1)),
        objective=ObjectiveConfig(kind="ar", logit_scale=1.0),
        generation=GenerationConfig(tail_length=min(8, positions - 2)),
    )


def _shapes(config: Config, vocab_size: int) -> Shapes:
    try:
        shapes = param_shapes(config, vocab_size)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # sizes that are too large for any array
        raise UserError(f"the settings describe an impossible model: {one_line(error)}") from None
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def _read(found: _Source, weights: list[Weight], names: dict[str, str], shapes: Shapes) -> Flat:
    """All parameters, from the file and from the sidecar; those in neither are newly initialised."""
    own = found.sidecar.params if found.sidecar else {}
    flat: Flat = dict(own)
    done = 0
    with bar("reading weights", len(names)) as progress:
        for weight in weights:
            is_derived = weight.name in (found.sidecar.derived if found.sidecar else ())
            if not is_derived:
                flat |= {path: np.empty(shapes[path], np.float32) for path in weight.paths}
            for layer in layers_of(weight, found.config):
                stored = found.stored.read(names[weight.name.format(layer=layer)])
                if is_derived:
                    _check_derived(found.sidecar, weight.name, stored)
                else:
                    families.put(weight, layer, stored, flat)
                done += 1
                progress.update(done)
    rest = [path for path in shapes if path not in flat]
    if found.sidecar is None:
        return flat | _fresh(found.config, found.tokenizer.vocab_size, rest)
    wrong = rest or [path for path in flat if path not in shapes or flat[path].shape != shapes[path]]
    if wrong:
        raise UserError(f"{SIDECAR}/{_WEIGHTS}: {wrong[0]} is missing or does not fit {SIDECAR}/{_RUN}")
    return flat


def _fresh(config: Config, vocab_size: int, paths: list[str]) -> Flat:
    """Initial values of the parameters at `paths`; no others are computed."""

    @jax.jit
    def some():
        params = init_params(seed_key(config.train.seed), config, vocab_size)
        flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        return {path: flat[path] for path in paths}

    return jax.tree.map(np.asarray, some())


def _check_derived(sidecar: _Sidecar | None, name: str, stored: np.ndarray) -> None:
    assert sidecar is not None
    if _checksum(stored) != sidecar.derived[name]:
        raise UserError(f"weight {name} was changed after the export, so that the folder {SIDECAR}/ no longer goes "
                        f"with it: delete that folder to import the model as a plain language model")


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()


def _read_sidecar(folder: Path) -> _Sidecar:
    run = read_json(folder / _RUN)
    try:
        config = parse_config_json(json.dumps(run["config"]), str(folder / _RUN))
        params = safetensors.numpy.load_file(folder / _WEIGHTS)
        derived = dict(run["derived"])
    except (KeyError, TypeError, ValueError, OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {type(error).__name__} {one_line(error)}") from None
    return _Sidecar(config, load_tokenizer(folder / TOKENIZER), params, derived)


def nested(flat: Mapping[str, Any]) -> Params:
    """The tree of parameters that `flat` names by path."""
    params: Params = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        branch = params
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = array
    return params


def load_flat(workdir: Path) -> tuple[Config, Tokenizer, Flat]:
    """The newest parameters of a run, on the host."""
    load_config(workdir)  # a folder that is no run is refused by its first file
    tokenizer = load_tokenizer(workdir / TOKENIZER)
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params, config = load_plain(workdir, tokenizer.vocab_size, here)
    flat = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return config, tokenizer, flat


def save_flat(workdir: Path, flat: Flat) -> None:
    """Writes `flat` as the checkpoint of `workdir`, and empties it, so that two full copies never exist at once."""
    host, params = jax.devices("cpu")[0], {}
    for path in list(flat):
        params[path] = jax.device_put(flat.pop(path), host).block_until_ready()
    save_params(workdir, nested(params))


def export_weights(
    workdir: Path, out: Path, dtype: str | None = None, max_shard_size: int = 5 * 10**9
) -> dict[str, Any]:
    """Writes the model of `workdir` as safetensors that `transformers` loads, with its tokenizer and the sidecar.

    This exports the autoregressive view: committed vectors in, one prediction out, compared with the table (for a
    maturation run: K = 1 at rate 1). If `dtype` is None, it is that of the import, or float32 for a model trained here.
    Raises UserError if no family of checkpoints has the model's parts, and for a tail in front of a language model,
    which cannot be merged into it.
    """
    if (own := load_config(workdir)).objective.kind == "tail":
        raise UserError(f"{workdir} holds a tail in front of the model in {own.init_from}, whose weights act at slots "
                        f"alone and cannot be merged into it: export {own.init_from}, which the tail leaves as it is")
    config, tokenizer, flat = load_flat(workdir)
    facts = read_json(workdir / IMPORTED) if (workdir / IMPORTED).is_file() else {}
    family = families.family_of(config, facts.get("model_type"))
    if dtype is None:
        dtype = str(facts.get("dtype", "float32"))
        if dtype not in DTYPES:
            raise UserError(f"{workdir / IMPORTED} is damaged: dtype = {dtype}; say which to write with --dtype")
    stored, tied = _autoregressive_view(config, flat, families.input_factor(family, config))
    weights = families.weights(family.model_type, config.model, tied)
    derived = {weight.name: weight.paths[0] for weight in weights if weight.paths[0] in stored}
    shapes = {path: array.shape for path, array in (flat | stored).items()}
    places = {weight.name.format(layer=layer): (weight, layer) for weight in weights
              for layer in layers_of(weight, config)}
    verbatim = {path for weight in weights for path in weight.paths} - set(stored)

    def get(name: str) -> np.ndarray:
        return families.get(*places[name], flat | stored)

    with appears_whole(out) as unfinished:
        write_safetensors(unfinished, {name: families.stored_shape(weight, shapes) for name, (weight, _) in
                                       places.items()}, get, DTYPES[dtype], max_shard_size)
        write_settings(unfinished, family, config, tokenizer, tied, dtype)
        sidecar = unfinished / SIDECAR
        sidecar.mkdir()
        own = {path: np.ascontiguousarray(array) for path, array in flat.items() if path not in verbatim}
        safetensors.numpy.save_file(own, sidecar / _WEIGHTS)
        sums = {name: _checksum(get(name).astype(DTYPES[dtype])) for name in derived}
        write_json(sidecar / _RUN, {"config": dataclasses.asdict(config), "derived": sums})
        tokenizer.save(sidecar / TOKENIZER)
    return {"model_type": family.model_type, "dtype": dtype, "weights": len(places), "derived": list(derived),
            "num_parameters": sum(int(np.prod(shape)) for shape in
                                  (families.stored_shape(weight, shapes) for weight, _ in places.values()))}


def _autoregressive_view(config: Config, flat: Flat, factor: float) -> tuple[Flat, bool]:
    """Parameters to store instead of ours so that a plain Transformer computes the same, and whether E is its head.

    With a = 1 + γ and b from the conditioning of committed positions, the input a ⊙ (s·e + p) + b has rows a ⊙ s·e and
    positions a ⊙ p + b (without learned positions the rows take b too); logits κ' ⟨Hx, r⟩ have output rows κ' Hᵀr.
    That Transformer multiplies its input rows by `factor`. If all of that is neutral, nothing is changed.
    """
    if config.model.film != "once":
        raise UserError("model.film 'per_layer' has no counterpart in a plain Transformer: only 'once' can be exported")
    params = nested(flat)
    told = 0 if config.objective.kind == "ar" or config.maturation.num_tails > 0 else 1
    scale, shift = (np.asarray(x) for x in conditioning_of_committed(params["backbone"], config, told))
    input_scale = config.model.input_norm / config.table.radius / factor
    input_scale = 1.0 if abs(input_scale - 1) < _ROUNDING else input_scale
    vocabulary = vocabulary_of(params, config)
    logit_scale = float(ar_logit_scale_of(params, config))
    stored: Flat = {}
    if config.table.geometry == "sphere" or input_scale != 1 or np.any(scale != 1) or np.any(shift):
        rows = scale * (input_scale * np.asarray(vocabulary.table))
        if config.model.positions == "learned":
            stored["backbone/position/embedding"] = scale * flat["backbone/position/embedding"] + shift
        else:
            rows += shift / factor
        stored["table"] = rows
    if config.model.head == "identity" and logit_scale == 1 and not (config.table.tied and stored):
        return stored, config.table.tied
    linear = config.model.head == "linear"
    head = flat["backbone/head/kernel"] if linear else np.eye(config.model.embed_dim, dtype=np.float32)
    stored["readout"] = np.asarray(vocabulary.readout) @ (logit_scale * head.T)
    return stored, False
