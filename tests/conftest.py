"""A strict JAX for every test: no silent promotion, several CPU devices, and compilations kept between runs."""

import os
from pathlib import Path

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Half the time of a test run is compilation; what is computed stays the same up to rounding. The emitters through MLIR
# take three times as long as those before them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture
def optax_promotion():
    """optax multiplies floats with its integer counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a maturation run `run` and a baseline `ar`."""
    import runs

    folder = tmp_path_factory.mktemp("runs")
    runs.write_corpus(folder)
    runs.run(folder, "run")
    runs.run(folder, "ar", "--objective.kind", "ar")
    return folder
