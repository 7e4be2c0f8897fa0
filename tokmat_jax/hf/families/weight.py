"""Which stored weight is which parameter, and how its layout maps; one description serves both directions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokmat_jax.config import ModelConfig

BLOCKS = "backbone/blocks"
"""Where the parameters of the blocks are."""


@dataclass(frozen=True)
class Weight:
    """One stored weight."""

    name: str
    """As stored; `{layer}` stands for the number of the block."""
    paths: tuple[str, ...]
    """Our parameters; several are concatenated along the stored weight's last axis."""
    transposed: bool = False
    """Whether a matrix is stored as [out, in]; ours are [in, out]."""
    by_head: int = 0
    """If positive, the number of heads, each of which stores its share of all `paths` side by side."""

    @property
    def per_layer(self) -> bool:
        """Whether every block has one; ours are then stacked, [L, …]."""
        return "{layer}" in self.name


def norm(name: str, path: str, config: ModelConfig) -> Iterator[Weight]:
    """The weights of a norm."""
    yield Weight(f"{name}.weight", (f"{path}/scale",))
    if config.norm == "layer":
        yield Weight(f"{name}.bias", (f"{path}/bias",))


def matrix(
    name: str, parts: tuple[str, ...], bias: bool, transposed: bool = True, by_head: int = 0
) -> Iterator[Weight]:
    """A matrix of a block, and its bias if it has one."""
    yield Weight(f"{name}.weight", tuple(f"{BLOCKS}/{part}/kernel" for part in parts), transposed, by_head)
    if bias:
        yield Weight(f"{name}.bias", tuple(f"{BLOCKS}/{part}/bias" for part in parts), False, by_head)


def stored_shape(weight: Weight, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one layer's stored `weight` from the `shapes` of our parameters by path."""
    parts = [shapes[path][1:] if weight.per_layer else shapes[path] for path in weight.paths]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    return shape[::-1] if weight.transposed else shape


def put(weight: Weight, layer: int, stored: np.ndarray, params: dict[str, np.ndarray]) -> None:
    """Writes a `stored` weight of one layer into `params` by path."""
    array, begin = stored.T if weight.transposed else stored, 0
    if weight.by_head:
        array = _regroup(array, weight.by_head, len(weight.paths))
    for path in weight.paths:
        target = params[path][layer] if weight.per_layer else params[path]
        end = begin + target.shape[-1]
        target[...] = array[..., begin:end]
        begin = end


def get(weight: Weight, layer: int, params: dict[str, np.ndarray]) -> np.ndarray:
    """The stored form of one layer's `weight`: what `put` would read."""
    parts = [np.asarray(params[path][layer] if weight.per_layer else params[path]) for path in weight.paths]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    if weight.by_head:
        array = _regroup(array, len(weight.paths), weight.by_head)
    return np.ascontiguousarray(array.T if weight.transposed else array)


def _regroup(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """`array` whose last axis runs over [outer, inner, size], reordered to [inner, outer, size]."""
    return array.reshape(*array.shape[:-1], outer, inner, -1).swapaxes(-3, -2).reshape(array.shape)
