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

_SKIPPED = Path(__file__).resolve().parent.parent / ".cache" / "skipped.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-skipped", action="store_true",
                     help="run only what the last run without this option skipped, now that more is installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-skipped"):
        if not _SKIPPED.is_file():
            raise pytest.UsageError("nothing is known to have been skipped: run pytest without --only-skipped first")
        # A module that is skipped as a whole is known by its path.
        known = set(_SKIPPED.read_text().split("\n"))
        chosen = [item for item in items if {item.nodeid, item.nodeid.split("::")[0]} & known]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_terminal_summary(terminalreporter) -> None:
    config, skipped = terminalreporter.config, terminalreporter.stats.get("skipped", [])
    if not config.getoption("--only-skipped") and config.getoption("markexpr") == "not slow":
        _SKIPPED.parent.mkdir(exist_ok=True)
        _SKIPPED.write_text("\n".join(sorted({report.nodeid for report in skipped})))


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


_MAPPINGS = Path("/proc/self/maps")
_MANY = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Linux lets a process have 65,530 mappings and XLA makes ten for each program, so that a long run of tests would
    end in a crash: after a module that leaves many, all programs are dropped."""
    yield
    if _MAPPINGS.is_file() and _MAPPINGS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


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
