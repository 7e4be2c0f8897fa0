"""Facts about a setting, declared at its field: its range, whether a resumed run may change it, and so on."""

import dataclasses
import math
from typing import Any, ClassVar

from tokmat_jax.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def setting(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    below: float | None = None, symbol: str = "", **facts: bool,
) -> Any:
    """A field with a range, from which the value None is exempt.

    `symbol` is its name in the paper. Among the `facts`, `free` means that a resumed run may change the field, `paired`
    that a maturation run and its baseline must agree on it, and `own` that a run which starts from another model
    chooses it itself. If a field does not state a fact, it inherits that of its section.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={"bounds": bounds, "symbol": symbol, **facts})


def section(kind: Any, **facts: bool) -> Any:
    """A field that holds a whole section of settings; `facts` are the defaults for the fields in it."""
    return dataclasses.field(default_factory=kind, metadata=facts)


class Section:
    """Base of every section. Checks that each number is finite and lies within the bounds of its field."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, one.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{one.name} must be a finite number, found {value}")
            if value is not None and "bounds" in one.metadata:
                _check_bounds(f"{self.section}.{one.name}", value, one.metadata)


def _check_bounds(name: str, value: float, metadata: Any) -> None:
    low, above, high, below = (metadata["bounds"][key] for key in ("at_least", "above", "at_most", "below"))
    fine = ((low is None or value >= low) and (above is None or value > above)
            and (high is None or value <= high) and (below is None or value < below))
    symbol = f" ({metadata['symbol']})" if metadata["symbol"] else ""
    require(fine, f"{name}{symbol} must {_range(low, above, high, below)}, found {value}")


def _range(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    """A range in words."""
    if (low, above, high, below) == (0, None, None, None):
        return "not be negative"
    if (low, above, high, below) == (None, 0, None, None):
        return "be positive"
    if high is None and below is None:
        return f"be at least {low}" if low is not None else f"be above {above}"
    begin = f"[{low}" if low is not None else f"({above}"
    return f"lie in {begin}, {high}]" if high is not None else f"lie in {begin}, {below})"


def facts_of(kind: Any, fact: str, inherited: bool = False) -> dict[str, bool]:
    """The value of `fact` for every field of the config class `kind`: {dotted name: bool}."""
    found = {}
    for one in dataclasses.fields(kind):
        said, inner = one.metadata.get(fact, inherited), one.default_factory
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            found |= {f"{one.name}.{name}": value for name, value in facts_of(inner, fact, said).items()}
        else:
            found[one.name] = said
    return found
