"""Token Maturation (arXiv:2601.04854) in JAX: a language model that predicts vectors and commits tokens late.

    from tokmat_jax import Generator

    for sample in Generator.from_workdir("runs/quickstart").generate(["In the beginning"]):
        print(sample.text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokmat_jax.config import Config, GenerationConfig
    from tokmat_jax.generation.baselines import Baselines
    from tokmat_jax.generation.generator import Generator
    from tokmat_jax.generation.trajectory import load_trajectory

__version__ = "0.1.0"
__all__ = ["Baselines", "Config", "GenerationConfig", "Generator", "__version__", "load_trajectory"]

_HOMES = {
    "Baselines": "generation.baselines", "Config": "config", "GenerationConfig": "config",
    "Generator": "generation.generator", "load_trajectory": "generation.trajectory",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: `import tokmat_jax` takes no time and touches no device."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
