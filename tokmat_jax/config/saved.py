"""A Config as JSON, the differences between two of them, and which of these a resumed run may have."""

import dataclasses
import difflib
import json
from typing import Any

import pydantic

from tokmat_jax.config.checks import facts_of
from tokmat_jax.config.run import Config
from tokmat_jax.errors import UserError, one_line, shown

_MOST_LAYERS, _LARGEST_SIZE = 1 << 12, 1 << 24


def parse_config_json(text: str, where: str) -> Config:
    """The Config in the JSON `text`; raises UserError, naming `where`, if it is damaged or invalid."""
    try:
        _refuse_unknown(json.loads(text), Config, where)
        config = pydantic.TypeAdapter(Config).validate_json(text, strict=True)
        _refuse_giant(config, where)
        return config
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its values"
        raise UserError(f"{where}: {field}: {one_line(first['msg'])}") from None
    except (ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors too
        raise UserError(f"{where} is damaged: {one_line(error)}") from None


def _refuse_giant(config: Config, where: str) -> None:
    """Raises UserError for absurd sizes: the model's shape is computed before its weights are looked for."""
    for name, value in dataclasses.asdict(config.model).items():
        most = _MOST_LAYERS if name == "num_layers" else _LARGEST_SIZE
        if type(value) is int and value > most:
            raise UserError(f"{where}: model.{name} = {shown(value)} is not supported; it must be at most {most}")


def _refuse_unknown(data: Any, kind: type, where: str) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise UserError(f"{where}: unknown field {shown(name)}" + (f"; nearest: {near[0]!r}" if near else ""))
        default = fields[name].default_factory
        if dataclasses.is_dataclass(default) and isinstance(default, type):
            _refuse_unknown(value, default, f"{where}: {name}")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted fields in which two configs differ → (old, new)."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}".strip(".")).items()}

    before, after = flat(dataclasses.asdict(old), ""), flat(dataclasses.asdict(new), "")
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def check_same_run(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that a resumed run changes; raises UserError if it may not change one of them."""
    changed, free = differences(old, new), facts_of(Config, "free")
    for name, (before, after) in changed.items():
        if not free[name]:
            raise UserError(f"{new.workdir} holds a run with {name} = {before!r}, this command has {after!r}: "
                            f"give the same value, or another --workdir")
    return changed
