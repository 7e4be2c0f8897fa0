"""The house: rooms in one order, public names that cost nothing, and one file that knows flax.linen."""

import ast
import subprocess
import sys
from pathlib import Path

import tokmat_jax

PACKAGE = Path(tokmat_jax.__file__).parent
ORDER = ("errors", "keys", "output", "products", "progress", "config", "distributed", "method", "model", "storage",
         "data", "hf", "generation", "view", "training", "evaluation", "commands")


def imported(path):
    """Dotted names below the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.startswith("tokmat_jax."))
        elif isinstance(node, ast.ImportFrom) and node.module == "tokmat_jax":
            yield from (f"tokmat_jax.{one.name}" for one in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokmat_jax."):
            yield node.module


def test_no_room_imports_from_a_later_one():
    places = {name: place for place, name in enumerate(ORDER)}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for name in imported(path):
            assert places[name.split(".")[1]] <= places[room], f"{path.relative_to(PACKAGE)} imports {name}"


def test_method_code_knows_no_files_flags_or_models():
    allowed = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "flax", "jax", "tokmat_jax"}
    for path in (PACKAGE / "method").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_linen_has_one_home():
    homes = [path.name for path in PACKAGE.rglob("*.py") if "linen" in path.read_text()]
    assert homes == ["backbone.py"]


def test_public_names_are_there_and_cost_nothing_before_they_are_used():
    for name in tokmat_jax.__all__:
        assert getattr(tokmat_jax, name) is not None
    quick = "import sys, tokmat_jax; sys.exit('jax' in sys.modules or set(dir(tokmat_jax)) != set(tokmat_jax.__all__))"
    assert subprocess.run([sys.executable, "-c", quick], check=False).returncode == 0
