"""The files of `configs/`, which the package ships: a flag takes a path, or the name of one of them.

    --config configs/quickstart.py     a path that exists
    --config quickstart                a shipped config, from any folder
"""

import contextlib
from pathlib import Path

from tokmat_jax.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where the shipped files are: in the package if it was installed from a wheel, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def find(asked: str | Path, suffix: str, flag: str) -> Path:
    """The file `asked` for: a path that exists, else the shipped file NAME + `suffix` (".py" or ".toml").

    Raises UserError, with the shipped names, if there is neither; `flag` is the option that it quotes.
    """
    with contextlib.suppress(OSError):  # a name that no file can have
        if Path(asked).is_file():
            return Path(asked)
    known = {path.stem: path for path in sorted(folder().glob(f"*{suffix}")) if path.stem != "__init__"}
    if str(asked) in known:
        return known[str(asked)]
    raise UserError(f"{flag}: {str(asked)!r} is neither a file nor one of the shipped names {', '.join(known)}")
