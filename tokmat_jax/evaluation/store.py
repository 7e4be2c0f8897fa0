"""Stores finished parts of an evaluation, so that an interrupted evaluation can continue."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokmat_jax.errors import UserError
from tokmat_jax.storage.files import read_json, write_json
from tokmat_jax.storage.workdir import make_workdir


class Store:
    """A folder of JSON files, each with a fingerprint of its origin."""

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        make_workdir(folder)
        self._folder, self._made_from = folder, made_from
        self._found = {path.name for path in folder.glob("*.json")}
        self.reused: set[str] = set()
        """Parts that were reused from an earlier evaluation."""

    def get(self, kind: str, settings: Any, make: Callable[[], Any]) -> Any:
        """The part of a `kind` under `settings`: the stored part of an equal evaluation, or else the result of `make`.

        Parts and `settings` are plain JSON data; `kind` is a word.
        """
        key = hashlib.sha256(json.dumps([self._made_from, kind, settings], sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / f"{kind}-{key}.json"
        if path.is_file():
            try:
                found = read_json(path)["part"]
            except (UserError, KeyError):
                path.unlink()
            else:
                self.reused |= {path.name} & self._found
                return found
        part = make()
        write_json(path, {"kind": kind, "settings": settings, "part": part})
        return json.loads(json.dumps(part))

